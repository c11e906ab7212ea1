"""What the student learns by: a class for each objective, and their mixture."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Discriminator, Field

from oprd.config.common import PYDANTIC, Positive
from oprd.errors import ConfigError

Tokens = Literal["all", "first_k", "last_k", "last"]
Layers = Literal["all", "last", "even", "odd"] | tuple[Positive, ...]
Reduction = Literal["token_mean", "sequence_mean"]
Coefficient = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _check_layers(layers: str | tuple[int, ...]) -> None:
    if isinstance(layers, tuple) and (not layers or len(set(layers)) < len(layers)):
        raise ConfigError(f"layers must name each block once and at least one, got {list(layers)}")


def _check_k(tokens: Tokens, k: int | None) -> None:
    if k is not None and not tokens.endswith("_k"):
        raise ConfigError(f"k={k} has no meaning with tokens={tokens!r}; drop k or use first_k or last_k")


@dataclass(frozen=True, slots=True, kw_only=True)
class HiddenMSEConfig:
    """OPRD: match the student's hidden states to the teacher's. Defaults are the paper's setting."""

    __pydantic_config__ = PYDANTIC
    type: Literal["oprd"] = "oprd"
    layers: Layers = "all"
    """Which transformer blocks are matched, counted from 1."""
    tokens: Tokens = "last_k"
    k: Positive | None = None
    """With first_k or last_k: how many sampled tokens of each completion; 2000 unless given [paper]."""
    normalization: Literal["none", "l2"] = "none"
    """`l2` divides each state by its norm first, and then needs a coefficient of 100 to 1000 [code]."""
    reduction: Reduction = "token_mean"
    """`token_mean` [code], or the paper's Eq. 6 that divides per completion: `sequence_mean`."""
    coefficient: Coefficient = 1.0

    def __post_init__(self) -> None:
        _check_k(self.tokens, self.k)
        _check_layers(self.layers)


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputKLConfig:
    """OPD: match the student's next-token distribution to the teacher's. p = student, q = teacher."""

    __pydantic_config__ = PYDANTIC
    type: Literal["opd"] = "opd"
    divergence: Literal["reverse_kl", "forward_kl", "jsd"] = "reverse_kl"
    """reverse_kl = KL(p||q), forward_kl = KL(q||p), jsd = b KL(q||m) + (1-b) KL(p||m), m = b q + (1-b) p."""
    jsd_weight: Annotated[float, Field(gt=0, lt=1)] | None = None
    """b; 0.5 unless given."""
    estimator: Literal["full", "top_k", "sampled"] = "full"
    top_k: Positive | None = None
    """Size of the support of estimator top_k; 16 unless given."""
    support: Literal["student", "teacher", "overlap"] | None = None
    """Whose top k; `student` unless given."""
    kl_temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Divides both models' logits in the loss. Not the sampling temperature; no factor is put back."""
    importance_clip: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = None
    """With estimator sampled and rollout.updates_per_rollout above 1: largest importance weight; 2 unless given [ours]."""
    redraw: bool = False
    """With estimator sampled: draw the token anew from the student at every position instead of taking the trajectory's.
    Unbiased given the prefix on any trajectory, such as one that a teacher wrote [ours]."""
    tokens: Tokens = "all"
    k: Positive | None = None
    reduction: Reduction = "token_mean"
    coefficient: Coefficient = 1.0

    def __post_init__(self) -> None:
        _check_k(self.tokens, self.k)
        if self.jsd_weight is not None and self.divergence != "jsd":
            raise ConfigError(f"jsd_weight has no meaning with divergence={self.divergence!r}; drop it")
        if self.estimator != "top_k" and (self.top_k is not None or self.support is not None):
            raise ConfigError(f"top_k and support have no meaning with estimator={self.estimator!r}; drop them")
        if self.estimator != "sampled" and self.importance_clip is not None:
            raise ConfigError(
                f"importance_clip has no meaning with estimator={self.estimator!r}: it needs no importance weights; drop it"
            )
        if self.redraw and self.estimator != "sampled":
            raise ConfigError(f"redraw has no meaning with estimator={self.estimator!r}; drop it")
        if self.estimator == "sampled" and self.kl_temperature != 1.0:
            raise ConfigError(
                "estimator 'sampled' is unbiased only at kl_temperature 1, where the tokens were sampled; "
                f"got {self.kl_temperature}. Use estimator 'full' or 'top_k', or drop kl_temperature"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class BridgeFitConfig:
    """How `oprd fit-bridge` fits the projections, from the student's completions of the fit prompts."""

    __pydantic_config__ = PYDANTIC
    method: Literal["closed_form", "gradient"] = "closed_form"
    """`closed_form` [ours]: from second moments. `gradient`: PCA and Adam on kept rows, the authors' recipe [code]."""
    prompts: str | None = None
    """A dataset of its own, of the same columns; the recipe's prompts unless given."""
    limit: Positive = 2000
    """Use at most so many prompts; 2000 [paper]."""
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the prompts that only measure; 0.1 [paper]."""
    max_rank: Positive = 4096
    """Largest rank kept in the file, cut to the smaller width; every smaller one is in it."""
    confidence: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Fit only to rows at which the student gives its likeliest next token at least this probability; 0 takes all. A state in
    which the student hesitates says how it hesitates, and targets made of such states are not sharp [ours]."""
    features: Annotated[int, Field(ge=0, le=16384)] = 512
    """Random ReLU features of the teacher's states beside these, for the canonical directions; 0 leaves the fit linear
    [ours]. The fit's sums grow with the square of width and features."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BridgeConfig:
    """OPRD-Bridge: match the states of two models of any width, depth and tokenizer, in a space that they share."""

    __pydantic_config__ = PYDANTIC
    type: Literal["oprd_bridge"] = "oprd_bridge"
    bridge: str
    """The file that `oprd fit-bridge` writes and training reads."""
    space: Literal["student", "projections"] = "student"
    """Where states are compared. `projections`: P_S h_S with P_T h_T, as published. `student`: h_S with the state that the
    student had there before training, its coordinates along the canonical directions moved to the teacher's [ours];
    without LoRA a frozen copy of the student is kept for it."""
    loss: Literal["hidden", "reverse_kl"] = "hidden"
    """`hidden`: squared distance of the states. `reverse_kl`, with space `student` and the last block: KL(student || target)
    of what the student's LM head says of its state and what it said before training of the target, over the student's own
    vocabulary, whatever the teacher's is [ours]; in nats, so a coefficient of 1 is usual."""
    rank: Literal["auto", "auto_shared", "full"] | Positive | tuple[Positive, ...] = "full"
    """`full`: all directions; best in the student's space [ours], where those left out keep the student's own mistakes.
    `auto`: for each block pair the largest r whose r-th held-out squared canonical correlation is at least 1/2;
    `auto_shared`: the same of their mean over the pairs, one rank for all. A list has one for each matched block."""
    layers: Layers = "last"
    """Which of the student's blocks are matched, counted from 1; each has its partner by relative depth. `all` [paper]; the
    last alone taught more here [ours]."""
    tokens: Tokens = "last_k"
    k: Positive | None = None
    normalization: Literal["none", "l2"] = "l2"
    """`l2` divides each side by its norm first [code]. With loss `reverse_kl` it concerns the fit's held-out numbers alone."""
    trust: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """With space `student` and another tokenizer: a pair whose next token the student before training gave less than this
    probability is dropped. Whether a teacher's piece ends there hangs on what follows, and a digit that is written in place
    of the rest of a number would otherwise find a partner that agrees [ours]."""
    sharpen: bool = True
    """With space `student`: move each target of the last block on until the student's LM head is as sure of its likeliest
    next token as the teacher is of its own, up to 0.99. A map that minimises squared errors says less than the teacher [ours]."""
    trainable: bool = False
    """Train the student's projections along; the teacher's stay as fitted."""
    refit_every: Positive | None = None
    """Fit again in closed form after so many steps, on those steps' rollouts: the student moves away from the fit."""
    fit: BridgeFitConfig = field(default_factory=BridgeFitConfig)
    reduction: Reduction = "token_mean"
    coefficient: Coefficient = 10.0
    """10 [code]."""

    def __post_init__(self) -> None:
        _check_k(self.tokens, self.k)
        _check_layers(self.layers)
        if self.space == "student" and (self.trainable or self.refit_every is not None):
            raise ConfigError(
                "trainable and refit_every move the projections; with space 'student' nothing is projected. Drop them, or "
                "set space=projections"
            )
        if self.loss == "reverse_kl" and (self.space, self.layers) != ("student", "last"):
            raise ConfigError(
                f"loss 'reverse_kl' looks at targets of the last block through the student's LM head; got space "
                f"{self.space!r} and layers {self.layers!r}. Set space=student and layers=last, or loss=hidden"
            )
        if self.trainable and self.refit_every is not None:
            raise ConfigError("trainable and refit_every both move the projections; drop one of them")
        if isinstance(self.rank, tuple) and isinstance(self.layers, tuple) and len(self.rank) != len(self.layers):
            raise ConfigError(f"rank lists {len(self.rank)} ranks for {len(self.layers)} layers; give one for each")


@dataclass(frozen=True, slots=True, kw_only=True)
class OmniOPDConfig:
    """OmniOPD: the teacher continues what the student wrote, and chunks it would have written too are reinforced."""

    __pydantic_config__ = PYDANTIC
    type: Literal["omni_opd"] = "omni_opd"
    audit: Literal["entropy", "random"] = "entropy"
    """Where chunks begin: at the student's tokens of highest entropy [second-hand], or anywhere."""
    chunks: Positive = 10
    """At most so many in a completion: M."""
    chunk_tokens: Positive = 50
    """C."""
    continuations: Positive = 10
    """The teacher's, of each audited prefix: N."""
    teacher_temperature: Annotated[float, Field(gt=0, le=10)] = 1.0
    """Ours: not published. Greedy continuations would all be the same."""
    similarity: Literal["edit", "embedding"] = "edit"
    """1 - Levenshtein / longer length, over characters, or the cosine of sentence embeddings cut to [0, 1]."""
    embedding_model: str | None = None
    """Folder or Hub name of the sentence-embedding model."""
    prior: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """Weight of the student's own probability in the target, in continuations: alpha."""
    anchor: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.1
    """Coefficient of KL(student at start || student) outside the audited chunks: beta."""
    baseline: Literal["none", "batch_mean", "leave_one_out"] = "batch_mean"
    """Subtracted from the targets: nothing (as published), their mean over the step, or their mean over the prompt's
    other completions [ours]. Without one the loss only ever reinforces, and the miniature lost accuracy."""
    tokens: Literal["all", "first_k"] = "all"
    """With first_k chunks and anchor keep to the first k sampled tokens [ours]."""
    k: Positive | None = None
    coefficient: Coefficient = 1.0

    def __post_init__(self) -> None:
        _check_k(self.tokens, self.k)
        if self.k is not None and self.k < self.chunk_tokens:
            raise ConfigError(
                f"chunks of {self.chunk_tokens} tokens have no room in the first k={self.k}; raise k, or lower chunk_tokens"
            )
        if (self.embedding_model is None) != (self.similarity == "edit"):
            raise ConfigError("give embedding_model with similarity 'embedding', and only then")


@dataclass(frozen=True, slots=True, kw_only=True)
class RewrittenConfig:
    """Negative log-likelihood of the teacher's text, for a teacher that rewrites or writes the completions itself."""

    __pydantic_config__ = PYDANTIC
    type: Literal["nll"] = "nll"
    tokens: Tokens = "all"
    k: Positive | None = None
    reduction: Reduction = "token_mean"
    coefficient: Coefficient = 1.0

    def __post_init__(self) -> None:
        _check_k(self.tokens, self.k)


SingleObjective = HiddenMSEConfig | OutputKLConfig | BridgeConfig | OmniOPDConfig | RewrittenConfig
OneObjectiveConfig = Annotated[SingleObjective, Discriminator("type")]


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureConfig:
    """A weighted sum of objectives, each with its own coefficient: the paper's `opd + mu * oprd`."""

    __pydantic_config__ = PYDANTIC
    type: Literal["mixture"] = "mixture"
    terms: tuple[OneObjectiveConfig, ...]

    def __post_init__(self) -> None:
        if len(self.terms) < 2:
            raise ConfigError(f"a mixture needs at least two terms, got {len(self.terms)}; use the term itself")


ObjectiveConfig = Annotated[SingleObjective | MixtureConfig, Discriminator("type")]


def objective_terms(objective: ObjectiveConfig) -> tuple[SingleObjective, ...]:
    """The objectives that are summed: a mixture's terms, or the objective itself."""
    return objective.terms if isinstance(objective, MixtureConfig) else (objective,)
