"""A run's whole recipe in one config: the model, how it is stored, what is attached, the data, the loop."""

from dataclasses import dataclass, field
from pathlib import Path
from time import strftime
from typing import ClassVar, Literal

from models import AdapterConfig, BitfitConfig, Ia3Config, LoraConfig, PrefixConfig
from models.methods import MethodName
from models.parallel.shard import ShardConfig
from nf4 import QuantConfig
from train.data import DataConfig
from train.loop import LoopConfig
from train.mmlu import MmluConfig


@dataclass(frozen=True, kw_only=True)
class RunConfig(LoopConfig):
    """Everything that decides a run; config.toml in its directory, and the flags of `qlora train`."""

    presets: ClassVar[Path] = Path(__file__).parent / "presets"
    """Settings that are known by name."""

    model: str
    """Checkpoint to start from: a directory, a file in it, or a .gguf."""
    out: str | None = None
    """The run's directory; runs/NAME by default."""
    name: str | None = None
    """The run's name; time and model by default."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """What the model computes in; auto is bfloat16 where the device multiplies it, else float32. Where every weight is
    trained, it is so in float32 all the same."""
    device: str = "auto"
    """Where to train: cpu, cuda, cuda:1; auto is cuda if there is one."""
    quantize: bool = True
    """Store the base's linear layers in few bits; without it this is plain LoRA."""
    adapters: bool = True
    """Train adapters on a frozen base; without it every weight is trained, which needs quantize = false."""
    method: MethodName = "lora"
    """What the adapters are: lora, ia3 (vectors that scale), bitfit (biases) or prefix (keys and values before the
    text); the table of that name has its settings."""
    task: Literal["auto", "causal", "seq2seq", "classification", "regression"] = "auto"
    """What is learned; auto follows from the model and, for a RoBERTa, from the labels of the data."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass instead of keeping them."""
    seed: int = 42
    """Decides the start of adapters and of a new head, and dropout; data.seed decides the order of the data."""
    quant: QuantConfig = field(default_factory=QuantConfig)
    """How the base is stored."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """The adapters, of LoRA."""
    ia3: Ia3Config = field(default_factory=Ia3Config)
    """The adapters, of IA3."""
    bitfit: BitfitConfig = field(default_factory=BitfitConfig)
    """The adapters, of BitFit."""
    prefix: PrefixConfig = field(default_factory=PrefixConfig)
    """The adapters, of prefix tuning."""
    data: DataConfig
    """What to train on."""
    samples: int = 0
    """At each evaluation, answer the prompts of so many held-out examples; eval/samples.jsonl keeps the answers."""
    sample_prompts: tuple[str, ...] = ()
    """Texts to be answered likewise: messages of a user where chats are learned, else texts to go on from."""
    sample_tokens: int = 64
    """Longest such answer."""
    mmlu: MmluConfig = field(default_factory=MmluConfig)
    """The benchmark that the paper tracks."""
    distributed: Literal["auto", "ddp", "fsdp"] = "auto"
    """With several processes: ddp gives each the whole model, fsdp a share of it; auto is ddp where the model fits."""
    fsdp: ShardConfig = field(default_factory=ShardConfig)
    """How a model is shared."""
    nproc: int = field(default=1, metadata={"saved": False})
    """Train on so many processes of this machine, a GPU each; torchrun starts them on several machines."""
    timeout: float = 600.0
    """Seconds that a process waits for the others before it gives up."""
    tensorboard: bool = False
    """Write the run's numbers for TensorBoard as well."""
    overwrite: bool = field(default=False, metadata={"saved": False})
    """Replace an earlier run in the same directory."""
    quiet: bool = field(default=False, metadata={"saved": False})
    """Show no progress."""

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("model must name a checkpoint")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be at least 0 and below 2^63, not {self.seed}")
        if not self.timeout > 0:
            raise ValueError(f"timeout must be above 0 seconds, not {self.timeout}")
        for name, least in (("samples", 0), ("sample_tokens", 1), ("nproc", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if "" in self.sample_prompts:
            raise ValueError("sample_prompts holds an empty text; there is nothing to answer")
        if self.quantize and not self.adapters:
            raise ValueError(
                "adapters is false, so every weight would be trained, and weights in few bits cannot be; "
                "set quantize = false as well (--no-quantize)"
            )
        if not self.adapters and self.method != "lora":
            raise ValueError(f"method is {self.method}, but adapters is false, so every weight would be trained")
        if self.name is not None and (not self.name or Path(self.name).name != self.name):
            raise ValueError(f"name must be a plain name without slashes, not {self.name!r}; out takes a path")
        super().__post_init__()

    @property
    def adapter(self) -> AdapterConfig:
        """The settings of the adapters that are trained."""
        return getattr(self, self.method)

    def directory(self) -> Path:
        """Give the run's directory; with neither out nor name set it depends on the time."""
        if self.out is not None:
            return Path(self.out)
        return Path("runs") / (self.name or f"{strftime('%Y-%m-%d-%H%M%S')}-{Path(self.model).stem}")
