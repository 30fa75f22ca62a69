"""The sections of a configuration, each field written once.

A field is ``name: Annotated[type, bounds, Doc("...")] = default``. Its help, its bounds, its command-line option and
its JSON Schema come from that one line. Sections are frozen: nothing changes a configuration after it is loaded. This
module imports neither torch nor any other heavy package. Its annotations are objects: as text (``from __future__ import
annotations``) each would have to be compiled before a configuration is read.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt
from attrs import field, frozen
from typing_extensions import Doc

from gpt_simple.config.frozen import frozen_dict
from gpt_simple.config.types import IsPath

Precision = Literal["auto", "bf16", "fp16", "no"]


@frozen
class ModelConfig:
    """``[model]`` of the component ``gpt``: a pre-norm decoder."""

    name: Annotated[str, Doc("model component")] = "gpt"
    vocab_size: Annotated[
        int | None,
        Ge(1),
        Doc("rows of the embedding; unset: the tokenizer's size, padded to a multiple of 128"),
    ] = None
    n_embd: Annotated[int, Ge(1), Doc("width of the residual stream")] = 768
    n_layer: Annotated[int, Ge(1), Doc("number of blocks")] = 12
    n_head: Annotated[int, Ge(1), Doc("attention heads; must divide n_embd")] = 12
    n_kv_head: Annotated[
        int | None, Ge(1), Doc("key/value heads; unset: n_head (MHA); 1 is MQA; must divide n_head")
    ] = None
    n_positions: Annotated[int | None, Ge(1), Doc("longest sequence the model is made for; unset: data.max_length")] = (
        None
    )
    dropout: Annotated[float, Ge(0), Lt(1), Doc("dropout on embedding, attention and residual branches")] = 0.0
    use_bias: Annotated[bool, Doc("biases in all linear layers and LayerNorms")] = False
    qkv_bias: Annotated[bool | None, Doc("bias of the query, key and value projections; unset: use_bias")] = None
    attn_out_bias: Annotated[bool | None, Doc("bias of the attention's output projection; unset: use_bias")] = None
    mlp_bias: Annotated[bool | None, Doc("bias of the MLP's projections; unset: use_bias")] = None
    activation: Annotated[Literal["swish", "gelu", "relu"], Doc("activation of the MLP")] = "swish"
    mlp_type: Annotated[
        Literal["gated", "mlp"], Doc("gated (SwiGLU, GeGLU, ReGLU by activation) or a plain two-layer MLP")
    ] = "gated"
    intermediate_size: Annotated[
        int | None,
        Ge(1),
        Doc("width of the MLP; unset: 8/3 n_embd rounded up to a multiple of 64 if gated, else 4 n_embd"),
    ] = None
    norm: Annotated[Literal["rmsnorm", "layernorm"], Doc("normalisation before attention, MLP and head")] = "rmsnorm"
    norm_eps: Annotated[float, Gt(0), Doc("epsilon of the normalisation")] = 1e-5
    tie_word_embeddings: Annotated[bool, Doc("the head shares the embedding's matrix")] = True
    rope_base: Annotated[float, Gt(0), Doc("base of the rotary angles")] = 10000.0
    rope_scaling_type: Annotated[
        Literal["linear", "ntk"] | None, Doc("stretch rotary positions beyond the trained length")
    ] = None
    rope_scaling_factor: Annotated[float, Ge(1), Doc("how far positions are stretched")] = 1.0
    position: Annotated[Literal["rope", "learned"], Doc("how positions enter the model")] = "rope"
    qk_norm: Annotated[bool, Doc("RMSNorm on queries and keys, per head, before the rotation")] = False
    residual_in_fp32: Annotated[
        bool, Doc("keep the residual stream in fp32; false: in the dtype of training.mixed_precision")
    ] = True


@frozen
class Phase:
    """One phase of a curriculum: its length, and the proportions of the buckets in it."""

    duration_tokens: Annotated[int, Ge(1), Doc("length of the phase in tokens (rows x max_length)")]
    mix: Annotated[Mapping[str, float], Doc("bucket -> weight; weights are normalised")]


@frozen
class DataConfig:
    """``[data]``: what is read, how it is cut into rows, and the order of rows."""

    path: Annotated[
        str | tuple[str, ...] | None, IsPath(), Doc("a dataset directory, or files and directories of raw text")
    ] = None
    source: Annotated[str | None, Doc("data source component; unset: shards for format pretokenized, else files")] = (
        None
    )
    format: Annotated[
        Literal["pretokenized", "jsonl", "text"] | None,
        Doc("what data.path holds; unset: pretokenized if it has a dataset.json, else by each file's suffix"),
    ] = None
    text_key: Annotated[str, Doc("key of the text in a JSON line")] = "text"
    on_bad_document: Annotated[
        Literal["error", "skip"], Doc("what happens with documents of files that cannot be read; all are reported")
    ] = "error"
    max_documents: Annotated[
        int | None,
        Ge(1),
        Doc("take at most this many documents; for stories, how many are generated (unset: 20,000)"),
    ] = None
    tokenizer: Annotated[
        str, IsPath(), Doc('"bpe" (trained on the data), "bytes", a path to a tokenizer.json, or a tokenizer component')
    ] = "bpe"
    tokenizer_vocab_size: Annotated[
        int, Ge(257), Le(1_000_000), Doc("size of the vocabulary when tokenizer is bpe")
    ] = 8192
    end_token: Annotated[
        str | None,
        Doc("token of a tokenizer.json that ends a document; unset: the first known name that it has, like </s>"),
    ] = None
    max_length: Annotated[int, Ge(2), Doc("tokens in a row: the context the model is trained on")] = 2048
    packing: Annotated[
        Literal["concat", "best_fit"],
        Doc("concat: documents in a stream, cut into rows; best_fit: short documents are never split"),
    ] = "concat"
    overlap_size: Annotated[
        int, Ge(0), Doc("best_fit: tokens that windows of a long document share; they count in the loss once")
    ] = 0
    document_mask: Annotated[
        bool, Doc("attention stays inside each document of a packed row and positions restart")
    ] = False
    val_fraction: Annotated[
        float, Ge(0), Lt(1), Doc("share of documents held out (by hash) when the data have no val split")
    ] = 0.05
    num_workers: Annotated[int, Ge(0), Doc("threads that prepare batches ahead; 0: in the training thread")] = 1
    seed: Annotated[int | None, Ge(0), Doc("seed of the order of samples; unset: training.seed")] = None
    curriculum: Annotated[
        tuple[Phase, ...], Doc("phases of {duration_tokens, mix}; empty: all buckets by their size")
    ] = ()
    on_exhaustion: Annotated[
        Literal["repeat", "halt", "renormalise"], Doc("what happens when a bucket has been read to its end")
    ] = "repeat"


@frozen
class OptimizerConfig:
    """``[optimizer]``: the optimizer and the learning rate as a function of the step."""

    name: Annotated[str, Doc("optimizer component")] = "adamw"
    learning_rate: Annotated[float, Gt(0), Doc("peak learning rate")] = 3e-4
    weight_decay: Annotated[float, Ge(0), Doc("decoupled weight decay, on matrices only")] = 0.1
    beta1: Annotated[float, Ge(0), Lt(1), Doc("decay of the first moment")] = 0.9
    beta2: Annotated[float, Ge(0), Lt(1), Doc("decay of the second moment")] = 0.95
    eps: Annotated[float, Gt(0), Doc("epsilon of AdamW")] = 1e-8
    max_grad_norm: Annotated[float | None, Gt(0), Doc("gradients are clipped to this norm; null: off")] = 1.0
    schedule: Annotated[str, Doc("schedule component: cosine, linear, wsd (warmup-stable-decay) or constant")] = (
        "cosine"
    )
    warmup_steps: Annotated[int, Ge(0), Doc("steps of linear warm-up")] = 100
    decay_steps: Annotated[
        int | None,
        Ge(1),
        Doc("length of the decay; unset: to max_steps (wsd: their last fifth); the floor holds afterwards"),
    ] = None
    min_lr_ratio: Annotated[float, Ge(0), Le(1), Doc("floor of the decay, as a share of learning_rate")] = 0.1


@frozen
class WarmupStage:
    """One stage of the warm-up of batch size and sequence length."""

    steps: Annotated[int, Ge(1), Doc("optimizer steps that the stage lasts")]
    gradient_accumulation_steps: Annotated[
        int | None, Ge(1), Doc("micro-batches in an optimizer step; unset: training.gradient_accumulation_steps")
    ] = None
    length: Annotated[
        int | None,
        Ge(2),
        Doc("samples are cut into rows of so many tokens, a divisor of data.max_length; unset: data.max_length"),
    ] = None


@frozen
class TrainingConfig:
    """``[training]``: the run."""

    per_device_batch_size: Annotated[int, Ge(1), Doc("rows in a micro-batch of one process")] = 4
    gradient_accumulation_steps: Annotated[int, Ge(1), Doc("micro-batches in an optimizer step")] = 4
    warmup_stages: Annotated[
        tuple[WarmupStage, ...],
        Doc("first stages of {steps, gradient_accumulation_steps, length}: batch-size and sequence-length warm-up"),
    ] = ()
    max_steps: Annotated[int, Ge(1), Doc("optimizer steps of the run")] = 1000
    step: Annotated[str, Doc("step component, which makes the gradients of an optimizer step")] = "standard"
    loss: Annotated[str, Doc("loss component; standard: the model's own summed cross-entropy")] = "standard"
    mixed_precision: Annotated[
        Precision | None, Doc("null or auto: bf16 on Ampere and newer, fp16 on older CUDA, none on CPU")
    ] = None
    compile: Annotated[bool, Doc("torch.compile the model")] = True
    compile_scope: Annotated[
        Literal["model", "blocks"], Doc("compile the whole model, or each block (starts faster)")
    ] = "model"
    compile_backend: Annotated[str, Doc("backend of torch.compile; inductor needs a compiler")] = "inductor"
    gradient_checkpointing: Annotated[
        bool | int | Literal["auto"],
        Ge(0),
        Doc("recompute activations in backward: true, false, every k-th block, or auto: false if the run fits"),
    ] = True
    activation_memory_budget: Annotated[
        float | None,
        Ge(0),
        Le(1),
        Doc("compiled runs: share of the activations to keep, the rest is recomputed; unset: torch's choice"),
    ] = None
    seed: Annotated[int, Ge(0), Doc("seed of weights, dropout and, unless data.seed is set, of the order")] = 42
    deterministic: Annotated[
        bool, Doc("kernels that repeat their bits on a GPU, so that a resume is bit-exact there; they are slower")
    ] = False
    logging_steps: Annotated[int | None, Ge(0), Doc("steps between logged metrics; null or 0: off")] = 10
    eval_steps: Annotated[int | None, Ge(0), Doc("steps between evaluations; null or 0: off")] = 500
    max_eval_batches: Annotated[
        int | None, Ge(1), Doc("evaluate at most this many batches of per_device_batch_size rows; null: all")
    ] = None
    save_steps: Annotated[int | None, Ge(0), Doc("steps between checkpoints; null or 0: only the last one")] = 1000
    save_after_eval: Annotated[
        bool, Doc("evaluate before the checkpoint of the same step, which then holds what the evaluation decided")
    ] = False
    background_save: Annotated[
        bool | Literal["auto"],
        Doc(
            "write periodic checkpoints while training goes on, from a copy in host memory; auto: on a GPU, if it fits"
        ),
    ] = "auto"
    keep_last_k: Annotated[int | None, Ge(1), Doc("checkpoints that are kept; null: all")] = 3
    keep_milestone_every: Annotated[
        int | None, Ge(0), Doc("checkpoints at multiples of this step are kept for ever; null or 0: none")
    ] = None
    checkpoint_store: Annotated[
        str, Doc("store component that also keeps the checkpoints elsewhere; local: the run directory alone")
    ] = "local"
    max_skipped_steps: Annotated[
        int | None, Ge(1), Doc("halt after this many steps in a row whose gradients were not finite; null: never")
    ] = 25
    output_dir: Annotated[str, IsPath(), Doc("directory of the run, relative to the current one")] = "outputs"
    resume: Annotated[
        str,
        IsPath(),
        Doc('"auto" (the newest valid checkpoint, else from scratch), "scratch", or a checkpoint\'s path'),
    ] = "auto"
    max_runtime_seconds: Annotated[float | None, Gt(0), Doc("stop, resumable, before this much time has passed")] = None
    walltime_reserve_seconds: Annotated[
        float, Ge(0), Doc("time kept back from max_runtime_seconds for the last checkpoint")
    ] = 30.0
    peer_timeout_seconds: Annotated[
        float, Gt(0), Doc("several processes: how long one waits for the others in a step before the run fails")
    ] = 600.0
    peak_flops: Annotated[
        float | None, Gt(0), Doc("peak FLOP/s of a device in the run's precision, for the MFU; unset: of a known GPU")
    ] = None
    parallel: Annotated[
        Literal["auto", "ddp", "fsdp"],
        Doc("several processes: each has the whole model (ddp), or a slice of it (fsdp); auto: ddp"),
    ] = "auto"
    shard_size: Annotated[
        int | None,
        Ge(1),
        Doc("fsdp: neighbouring processes that share a model, such as those of a machine; unset: all of them"),
    ] = None
    ddp_optimizer: Annotated[
        Literal["auto", "off", "split", "python_reducer"],
        Doc("Dynamo's DDP graph splitter; auto: off for compile + DDP + checkpointing, else torch's own"),
    ] = "auto"
    wandb_project: Annotated[str | None, Doc("Weights & Biases project; unset: W&B is off")] = None
    wandb_run_name: Annotated[str | None, Doc("name of the W&B run")] = None

    def saves_in_background(self, device_type: str) -> bool:
        """Whether ``background_save`` is on for a run on such a device (``cpu`` or ``cuda``)."""
        return device_type != "cpu" if self.background_save == "auto" else self.background_save


@frozen
class PluginsConfig:
    """``[plugins]``: switches, and one table per plugin.

    ``tables`` holds ``[plugins.NAME]``: an instance of the plugin's own config class if the plugin is loaded, else the
    raw mapping.
    """

    disable: Annotated[tuple[str, ...], Doc("plugins that are switched off")] = ()
    require: Annotated[tuple[str, ...], Doc("plugins without which the run does not start")] = ()
    strict: Annotated[bool, Doc("any plugin problem ends the run, also of plugins that would only be switched off")] = (
        False
    )
    tables: Mapping[str, Any] = field(factory=dict, converter=frozen_dict, metadata={"is_key": False})


@frozen
class Config:
    """The whole configuration of a run."""

    model: ModelConfig = field(factory=ModelConfig)
    data: DataConfig = field(factory=DataConfig)
    optimizer: OptimizerConfig = field(factory=OptimizerConfig)
    training: TrainingConfig = field(factory=TrainingConfig)
    plugins: PluginsConfig = field(factory=PluginsConfig)
