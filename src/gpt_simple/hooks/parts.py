"""What a component of each kind is: how the engine calls its factory, and what it uses of the part that this makes.

Types for authors of components, and the source of the documentation. A class ``*Extras`` has members that a part may
have: the engine uses them where they are there. The other protocols are in ``batch.py``, ``step.py``, ``losses.py``,
``store.py`` and ``data/sources``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from gpt_simple.config.schema import Config, DataConfig
    from gpt_simple.hooks.batch import Tokenizer
    from gpt_simple.hooks.losses import Loss, Losses
    from gpt_simple.hooks.step import Step
    from gpt_simple.hooks.store import CheckpointStore


class ModelFactory(Protocol):
    """Called with the section ``[model]``, on every process.

    ``vocab_size`` is the field of this name in ``[model]``, else the tokenizer's number of ids, rounded up.
    ``max_length`` is the length of a row. The model must also build on ``torch.device("meta")``, where tensors have no
    values.

    Example::

        @frozen
        class BigramConfig:
            name: str = "bigram"
            width: Annotated[int, Ge(1), Doc("width between embedding and head")] = 32


        class Bigram(nn.Module):
            def __init__(self, vocab_size, width):
                super().__init__()
                self.embedding, self.head = nn.Embedding(vocab_size, width), nn.Linear(width, vocab_size)

            def forward(self, input_ids, labels=None):
                logits = self.head(self.embedding(input_ids))
                if labels is None:
                    return logits
                logits, labels = logits.float().flatten(0, 1), labels.flatten()
                return F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")


        def bigram(config, *, vocab_size, max_length):
            return Bigram(vocab_size, config.width)


        train(component=Component("model", "bigram", bigram, BigramConfig))
    """

    def __call__(self, config: Any, *, vocab_size: int, max_length: int) -> torch.nn.Module: ...


class Model(Protocol):
    """A ``torch.nn.Module``. ``B`` is the number of rows, ``T`` their length, ``V`` the number of ids."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Tensor | Losses:
        """Without labels the logits [B, T, V]; with labels the cross-entropy *summed* over labels other than -100.

        The sum is in nats, 0-d float32. ``Losses`` hold further terms that are trained on beside it.
        """


class ModelExtras(Protocol):
    """The parameters of ``forward`` that some runs need, and attributes."""

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        *,
        weights: Tensor | None = None,
        hidden: bool = False,
    ) -> Tensor | Losses:
        """``position_ids`` and ``document_ids``, int64 [B, T], come with ``data.document_mask``.

        ``weights``, float32 [B, T], are the factors of the targets; they come with a source that has them. With
        ``hidden=True``, and without labels, a model returns the states [B, T, C] that its logits are made of; a loss
        that needs hidden states uses it. A model without the parameter is refused in a run that needs it.
        """

    blocks: torch.nn.ModuleList
    """The blocks that ``training.compile_scope = "blocks"`` compiles, and which ``training.parallel = "fsdp"`` gathers
    one by one."""

    n_positions: int
    """The number of tokens that the model can read. Samples that outgrow it go on from their newest half."""

    def init_weights(self) -> None:
        """Give every parameter and buffer its starting value, from torch's global generator.

        ``training.parallel = "fsdp"`` needs it: the model is built on the meta device, and an operation on a parameter
        here draws the whole of it, of which a process keeps its slice.
        """

    def set_activation_checkpointing(self, every: int) -> None:
        """Recompute every ``every``-th block in the backward pass, none with 0: ``training.gradient_checkpointing``."""

    def flops_per_token(self, length: int) -> float:
        """Floating-point operations of forward and backward for one token of a row of ``length``, for the MFU."""

    def document_kernel(self, device: torch.device) -> str:
        """The name of what keeps documents apart in attention, for the log."""


class OptimizerFactory(Protocol):
    """Called with the raw model, the section ``[optimizer]`` and the device, on every process.

    It optimizes the parameters with ``requires_grad``. Called again for ``run.control.rebuild_optimizer``. With
    ``training.parallel = "fsdp"`` parameters and gradients are ``torch.distributed.tensor.DTensor``, of which each
    process has a slice. State with the shape of its parameter is sharded like it; other state is the same on all
    processes.

    Example::

        def sgd(model, config, device):
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            return torch.optim.SGD(trained, lr=config.learning_rate, momentum=0.9)


        train(component=Component("optimizer", "sgd", sgd))
    """

    def __call__(self, model: torch.nn.Module, config: Any, device: torch.device) -> torch.optim.Optimizer: ...


class Optimizer(Protocol):
    """A ``torch.optim.Optimizer``.

    Its state may be in ``state``, in ``param_groups``, in its attributes or in further entries of ``state_dict``:
    tensors, numbers, text, and lists, tuples and dictionaries of them. Other state ends the run after its first step.
    """

    param_groups: list[dict[str, Any]]
    """The engine sets ``lr`` of each group in every step: the schedule's rate times ``lr_scale``, if it has one."""

    def step(self) -> Any:
        """Update the parameters from their ``grad``, which is unscaled and clipped."""

    def zero_grad(self) -> None:
        """Drop all gradients."""


class OptimizerExtras(Protocol):
    """What a fused optimizer and a schedule-free one have."""

    _step_supports_amp_scaling: bool
    """If true, ``step`` divides gradients by the tensor ``grad_scale`` and changes nothing if ``found_inf`` is set.

    Torch's fused optimizers have it. Then clipping takes no pass of its own, and skipping a step does not wait for the
    device.
    """

    def train(self) -> None:
        """Put the weights for training into the parameters."""

    def eval(self) -> None:
        """Put the weights for evaluation into the parameters.

        With both methods evaluations, samples and ``weights-eval.safetensors`` have these weights. Afterwards weights
        and state are what they were, to the bit.
        """


class ScheduleFactory(Protocol):
    """Called with the section ``[optimizer]`` and ``training.max_steps``, on every process.

    A factory with a parameter ``run_config`` gets the whole configuration, too, with the options of its plugin.

    Example::

        def inverse_sqrt(config, max_steps):
            warmup = max(1, config.warmup_steps)
            return lambda step: config.learning_rate * min(step / warmup, (warmup / step) ** 0.5)


        train(component=Component("schedule", "inverse_sqrt", inverse_sqrt))
    """

    def __call__(self, config: Any, max_steps: int, *, run_config: Config) -> Schedule: ...


class Schedule(Protocol):
    """A pure function of the step, so it has no state that a checkpoint would keep."""

    def __call__(self, step: int) -> float:
        """The learning rate of optimizer step ``step``, a finite number. Steps count from 1."""


class TokenizerFactory(Protocol):
    """Called with the section ``[data]`` when data are prepared.

    ``texts()`` iterates over the texts of the training documents, for a tokenizer that is trained. A run reads the
    ``tokenizer.json`` that ``save`` has written, as ``gpt_simple.data.tokenizer.load_tokenizer`` reads it, and compares
    the fingerprints. ``JsonTokenizer(name, backend, eod_id)`` is a ``Tokenizer`` from any tokenizer of the library
    ``tokenizers``. Without that file the factory is called again, with no texts, and ``gpt-simple sample`` refuses the
    run.

    Example::

        def letters(config, texts):
            known = sorted({letter for text in texts() for letter in text})
            vocabulary = {token: i for i, token in enumerate(["<|endoftext|>", "<unk>", *known])}
            backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
            backend.add_special_tokens(["<|endoftext|>"])
            backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
            backend.decoder = tokenizers.decoders.Fuse()
            return JsonTokenizer("letters", backend, eod_id=0)


        train(component=Component("tokenizer", "letters", letters))
    """

    def __call__(self, config: DataConfig, texts: Callable[[], Iterator[str]]) -> Tokenizer: ...


class SourceFactory(Protocol):
    """Called with the section ``[data]`` and ``data.seed`` (0 where it is unset). Returns a ``Source`` or a ``Stream``.

    Example::

        class Counting:
            def fingerprint(self):
                return "numbers 1"

            def documents(self):
                for first in range(100):
                    yield Document(" ".join(str(first + i) for i in range(9)), key=str(first))


        class Endless:
            def fingerprint(self):
                return "endless 1"

            def stream(self):
                for first in itertools.count():
                    yield Document(" ".join(str(first + i) for i in range(9)), key=str(first))


        train(component=Component("source", "counting", lambda config, seed: Counting()))
        train(component=Component("source", "endless", lambda config, seed: Endless()))
    """

    def __call__(self, config: Any, seed: int) -> Any: ...


class StepFactory(Protocol):
    """Called with the raw model and the whole configuration, on every process, also when the optimizer is rebuilt.

    Example::

        def signs(model, config):
            def step(batches, backward):
                loss = accumulate(batches, backward)
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter.grad.sign_()
                return loss

            return step


        train(component=Component("step", "signs", signs))
    """

    def __call__(self, model: torch.nn.Module, config: Config) -> Step: ...


class LossFactory(Protocol):
    """Called with the raw model and the whole configuration, on every process. Parameters of a loss are not trained.

    Example::

        class ZLoss:
            needs = "logits"

            def __call__(self, output, batch):
                logits, labels = output.float().flatten(0, 1), batch.labels.flatten()
                nats = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
                squares = logits.logsumexp(-1).square() * (labels >= 0)
                return Losses(nats, {"z_loss": 1e-4 * squares.sum()})


        train(component=Component("loss", "z", lambda model, config: ZLoss()))
    """

    def __call__(self, model: torch.nn.Module, config: Config) -> Loss: ...


class StoreFactory(Protocol):
    """Called with the whole configuration, on the main process.

    Example::

        class Folder:
            def __init__(self, root):
                self.root = root

            def find(self):
                return [path.parent.name for path in self.root.glob("step-*/MANIFEST.json")]

            def fetch(self, name, directory):
                shutil.copytree(self.root / name, directory, dirs_exist_ok=True)

            def published(self, path):
                shutil.rmtree(self.root / path.name, ignore_errors=True)
                shutil.copytree(path, self.root / "incomplete", dirs_exist_ok=True)
                (self.root / "incomplete").rename(self.root / path.name)


        trained = train(component=Component("store", "folder", lambda config: Folder(Path("copies"))))
        print(sorted(path.name for path in Path("copies").iterdir()))
    """

    def __call__(self, config: Config) -> CheckpointStore: ...


class StoreExtras(Protocol):
    """With it the store follows retention. Without it the store keeps everything."""

    def removed(self, name: str) -> None:
        """Remove the checkpoint ``name``, which the run directory does not keep any more."""


class TokenizerExtras(Protocol):
    """For bits per byte."""

    token_bytes_are_exact: bool
    """False for a tokenizer that changes text, or whose tokens are not pieces of its bytes.

    Then bits per byte are computed from the bytes of the text alone.
    """
