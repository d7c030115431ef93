"""The schema of the data path: sources and cleaning, tokenizer, and how rows become blank-infilling samples.

Two commands read it: `python -m data_prep` uses all of it, the trainer needs `path`, `workers` and `sampling`.
"""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from data_prep.errors import ConfigError

OBJECTIVES = ("blank_infilling", "causal")
POSITIONS = ("1d", "2d")
TEXT_DOCUMENTS = ("file", "line")
INSTRUCTION_MASKS = ("MASK", "gMASK")
EXECUTORS = ("local", "slurm", "ray")


@dataclass
class SamplingConfig:
    """How one row becomes a sample. The defaults are GLM-130B's (arXiv 2210.02414, table 11)."""

    objective: str = "blank_infilling"
    """blank_infilling, or causal: plain next-token prediction over the whole row."""
    gmask_share: float = 0.7
    """Part of the samples that hide the row's tail behind one [gMASK]."""
    mask_share: float = 0.3
    """Part of the samples that hide short spans behind [MASK] (or sentences, see sentence_share)."""
    sentence_share: float = 0.0
    """Of mask_share, the part that hides whole sentences behind [sMASK]; GLM-130B's table lists none."""
    mask_ratio: float = 0.15
    """Part of the text that spans hide: spans are drawn until they reach it, sentences never exceed it."""
    poisson_mean: float = 3.0
    """Mean of the Poisson law of span lengths, before it is limited to 1 … max_span_tokens."""
    max_span_tokens: int = 39
    """Longest span in tokens (a quarter of the segment's slots where that is less)."""
    min_gmask_ratio: float = 0.2
    """Shortest [gMASK] target, as a part of the row; its length is uniform from there to the whole row."""
    single_span_probability: float = 0.02
    """Chance that a [MASK] segment hides one span only."""
    short_text_probability: float = 0.02
    """Chance that a [MASK] segment is cut in two at a uniform point, each part at least 32 slots."""
    mask_segments: int = 4
    """[MASK] segments packed into one sequence; GLM-130B packs 4 of 512 slots."""
    spans_cross_documents: bool = False
    """Whether a span may run over a document's end; GLM-130B allowed it."""
    isolate_documents: bool = False
    """Whether each document is a segment of its own, unseen by its neighbours; GLM-130B joined them."""
    pack_documents: bool = False
    """Whether sequences are packed with whole documents (python -m data_prep.pack) instead of cut from the stream of
    tokens, so that no short document is cut; needs isolate_documents."""
    starts_with_enc: bool = False
    """Whether each segment of blanks begins with ENC, as GLM-10B's do; what fills blanks later puts it there too."""
    positions: str = "1d"
    """1d (GLM-130B), or 2d: the place of the mask, and the place inside the span."""
    instruction_share: float = 0.05
    """Part of the sequences that hold instructions (prompts and answers), where the dataset has some beside text."""
    instruction_mask: str = "MASK"
    """Mask token between prompt and answer: MASK (GLM-130B's multi-task instructions) or gMASK (ChatGLM)."""
    mixture_period: int = 1000
    """Samples over which mixture and kind shares are kept exactly; shares are rounded to one in so many."""

    def __post_init__(self) -> None:
        _choice("data.sampling.objective", self.objective, OBJECTIVES)
        _choice("data.sampling.positions", self.positions, POSITIONS)
        _choice("data.sampling.instruction_mask", self.instruction_mask, INSTRUCTION_MASKS)
        for name in ("gmask_share", "mask_share", "sentence_share", "instruction_share"):
            _within(f"data.sampling.{name}", getattr(self, name), 0.0, 1.0)
        for name in ("single_span_probability", "short_text_probability"):
            _within(f"data.sampling.{name}", getattr(self, name), 0.0, 1.0)
        _within("data.sampling.mask_ratio", self.mask_ratio, 0.01, 0.5)
        _within("data.sampling.min_gmask_ratio", self.min_gmask_ratio, 0.0, 1.0)
        _within("data.sampling.poisson_mean", self.poisson_mean, 0.01, 1000.0)
        _within("data.sampling.max_span_tokens", self.max_span_tokens, 1, 10_000)
        _within("data.sampling.mask_segments", self.mask_segments, 1, 1024)
        _within("data.sampling.mixture_period", self.mixture_period, 1, 1_000_000)
        if self.starts_with_enc and self.objective == "causal":
            raise ConfigError("data.sampling.starts_with_enc=true is for blanks; objective=causal has none")
        if self.pack_documents and not self.isolate_documents:
            raise ConfigError(
                "data.sampling.pack_documents=true packs documents that do not see one another; set "
                "data.sampling.isolate_documents=true too"
            )
        if abs(self.gmask_share + self.mask_share - 1.0) > 1e-6:
            raise ConfigError(
                f"data.sampling.gmask_share={self.gmask_share} and data.sampling.mask_share={self.mask_share} "
                "must add up to 1"
            )


@dataclass
class CleaningConfig:
    """What is done to a document's text and what keeps it aside, beyond the checks that are always made."""

    normalize_width: bool = False
    """Whether full-width letters, digits and spaces become their usual forms; Chinese punctuation stays."""
    simplify: bool = False
    """Whether Traditional Chinese becomes Simplified (with OpenCC)."""
    languages: list[str] = field(default_factory=list)
    """Languages that are kept, such as [zh, zh_hant, en, code]; empty keeps all."""
    quality: bool = False
    """Whether documents outside the limits of data_prep/quality.py are kept aside."""
    limits: dict[str, Any] = field(default_factory=dict)
    """Changes to these limits: {zh: {chinese: [0.3, 1]}, en: {stop_words: null}}."""
    mask_personal: bool = False
    """Whether phone numbers, identity numbers and e-mail addresses become placeholders."""
    near_duplicates: bool = False
    """Whether a document much like an earlier one is kept aside (MinHash)."""
    similarity: float = 0.7
    """Estimated Jaccard similarity of the shingles from which on two documents are near-duplicates."""
    bands: int = 20
    """Bands of a signature: more find pairs of lower similarity."""
    rows: int = 6
    """Minima in a band: more compare fewer documents that are not alike."""
    decontaminate: list[str] = field(default_factory=list)
    """Evaluation sets (jsonl or text files); a document that shares a long run of text with them is kept aside."""

    def __post_init__(self) -> None:
        _within("data.cleaning.similarity", self.similarity, 0.1, 1.0)
        _within("data.cleaning.bands", self.bands, 1, 128)
        _within("data.cleaning.rows", self.rows, 1, 32)


@dataclass
class PipelineConfig:
    """Where the pieces of work run. Nothing here changes what is prepared."""

    executor: str = "local"
    """local, slurm (array jobs through sbatch) or ray (an existing Ray cluster)."""
    workers: int | None = None
    """Pieces of work done at the same time; null: one a core, fewer for little input (local), no limit (slurm, ray)."""
    partition: str = ""
    """Slurm partition."""
    time_limit: str = "24:00:00"
    """Slurm time limit of one piece of work."""
    memory_gb: int = 4
    """Memory of one piece of work under slurm and ray."""
    cpus_per_task: int = 1
    """Cores of one piece of work under slurm and ray."""
    sbatch: dict[str, str] = field(default_factory=dict)
    """Further sbatch options, such as {account: team, qos: long}."""

    def __post_init__(self) -> None:
        _choice("data.pipeline.executor", self.executor, EXECUTORS)
        if self.workers is not None:
            _within("data.pipeline.workers", self.workers, 1, 100_000)
        _within("data.pipeline.memory_gb", self.memory_gb, 1, 4096)
        _within("data.pipeline.cpus_per_task", self.cpus_per_task, 1, 1024)


@dataclass
class DataConfig:
    """A dataset folder, what it is made from, and how it is read."""

    path: str = MISSING
    """Dataset folder: written by data_prep, read by the trainer."""
    sources: list[Any] = field(default_factory=list)
    """Files, globs, `bundled:NAME` or `hub:OWNER/NAME`; or an entry {path, name, lang, licence, weight,
    epochs, cap, text_field, template, target_field}."""
    text_field: str = "text"
    """Field or column that holds a document's text."""
    lang_field: str = "lang"
    """Field that holds a document's language; where it is absent the language is detected."""
    id_field: str = "id"
    """Field that names a document; the part before '#' names its page."""
    text_documents: str = "file"
    """What a document is in a plain text file: the whole file, or each line."""
    min_characters: int = 16
    """A shorter document is rejected."""
    max_characters: int = 10_000_000
    """A longer document is rejected."""
    max_line_bytes: int = 67_108_864
    """A longer line (or plain text file) is rejected without being parsed."""
    deduplicate: bool = True
    """Whether a document equal to an earlier one but for white space is rejected."""
    split_seed: int = 1234
    """Seed of the split by page."""
    split_shares: list[float] = field(default_factory=lambda: [940.0, 50.0, 10.0])
    """Shares of train, valid and test. GLM-130B's 949, 50, 1 leaves a small corpus without a test page."""
    max_shard_tokens: int = 1_073_741_824
    """A shard is closed at the first document end past so many tokens."""
    task_bytes: int = 268_435_456
    """A piece of work takes files of one source until they reach so many bytes, as they lie on the disk."""
    cleaning: CleaningConfig = field(default_factory=CleaningConfig)
    """What is done to the text."""
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    """Where the work is done."""
    overwrite: bool = False
    """Whether a dataset made with other settings in the same folder is replaced."""
    workers: int = 2
    """Processes that build samples for each rank; 0 builds them in the training process."""
    prefetch_batches: int = 4
    """Micro-batches that each worker prepares ahead."""
    mixture: list[Any] = field(default_factory=list)
    """Weights of the sources from given samples on, [{from_sample: 0, weights: {web: 3, books: 1}}, …]; empty takes the
    weights of data.sources, or on resume the plan in the checkpoint. Changed on resume, it holds from there on."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How rows become samples."""

    def __post_init__(self) -> None:
        _choice("data.text_documents", self.text_documents, TEXT_DOCUMENTS)
        if len(self.split_shares) != 3 or min(self.split_shares) < 0 or sum(self.split_shares) <= 0:
            raise ConfigError(
                f"data.split_shares={list(self.split_shares)} must be three numbers ≥ 0 (train, valid, test), not all 0"
            )
        _within("data.workers", self.workers, 0, 256)
        _within("data.prefetch_batches", self.prefetch_batches, 1, 1024)
        _within("data.min_characters", self.min_characters, 1, self.max_characters)
        _within("data.max_line_bytes", self.max_line_bytes, 1024, 1 << 40)
        _within("data.task_bytes", self.task_bytes, 1, 1 << 50)
        _within("data.max_shard_tokens", self.max_shard_tokens, 1024, 1 << 40)


@dataclass
class TokenizerConfig:
    """A SentencePiece unigram tokenizer trained on the train split, or one that is loaded."""

    path: str | None = None
    """SentencePiece model, tokenizer.json, ice_text.model or a dataset folder to use instead of training one."""
    image_tokens: int | None = None
    """Ids in front of the loaded pieces that no text uses: 20000 gives icetk's own ids; null: none, or the folder's."""
    specials: dict[str, str] = field(default_factory=dict)
    """Special tokens that the loaded file has under another name, such as {eod: "</s>"}; the others are added."""
    vocab_size: int = 8000
    """Pieces to train, bytes and the unknown included; special tokens come after them. Small text gives fewer."""
    character_coverage: float = 0.9995
    """Part of the text's characters that get a piece of their own, the others become bytes; lowered where these
    characters would take more than half of the pieces."""
    training_bytes: int = 100_000_000
    """UTF-8 bytes of text to train on, shared equally between the languages."""
    threads: int = 2
    """Threads that encode the text."""

    def __post_init__(self) -> None:
        if self.path is None and (self.image_tokens is not None or self.specials):
            raise ConfigError(
                "tokenizer.image_tokens and tokenizer.specials are for a tokenizer that tokenizer.path gives"
            )
        if self.image_tokens is not None:
            _within("tokenizer.image_tokens", self.image_tokens, 0, 1_000_000)
        _within("tokenizer.vocab_size", self.vocab_size, 300, 1_000_000)
        _within("tokenizer.character_coverage", self.character_coverage, 0.5, 1.0)
        _within("tokenizer.training_bytes", self.training_bytes, 10_000, 1 << 40)
        _within("tokenizer.threads", self.threads, 1, 1024)


@dataclass
class PrepConfig:
    """Everything `python -m data_prep` reads."""

    data: DataConfig = field(default_factory=DataConfig)
    """What is prepared, and where to."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """The tokenizer that is trained or loaded."""


def _choice(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{key}={value} must be one of {', '.join(allowed)}")


def _within(key: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{key}={value} must lie between {low} and {high}")
