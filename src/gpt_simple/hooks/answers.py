"""The former path of ``gpt_simple.hooks.results``."""

from gpt_simple.deprecation import warn_deprecated
from gpt_simple.hooks.results import REDUCTIONS as REDUCTIONS
from gpt_simple.hooks.results import Finding as Finding
from gpt_simple.hooks.results import Metric as Metric
from gpt_simple.hooks.results import Reduction as Reduction
from gpt_simple.hooks.results import Severity as Severity

warn_deprecated("gpt_simple.hooks.answers", removal="1.0", instead="gpt_simple.hooks")
