"""All settings of `declip prepare`; light, because the command line reads its defaults here."""

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from declip_cli.errors import require

SourceKind: TypeAlias = Literal["captions", "folder", "table", "coco", "flickr30k", "tars", "declip", "yfcc15m", "urls"]
Duplicates: TypeAlias = Literal["keep", "exact", "near"]
Engine: TypeAlias = Literal["threads", "ray"]


def _check_least(option: str, value: float | None, least: int) -> None:
    message = f"--{option} must be at least {least} (got {value})"
    require(value is None or value >= least, message, remedy=f"--{option} {least}, or omit it")


@dataclass(frozen=True, slots=True, kw_only=True)
class CleanConfig:
    """Which pairs are left out although they can be read; by default none."""

    min_caption_chars: int = 0
    """Shorter captions are left out; a pair goes when none is left."""
    max_caption_chars: int | None = None
    """Longer captions are left out; None is no limit."""
    scripts: tuple[str, ...] = ()
    """Unicode scripts, such as `latin`; a caption mostly in another is left out. Empty keeps all."""
    max_caption_repeats: int | None = None
    """Pairs that may share one caption, letter case and white space apart; None is no limit."""
    min_side_px: int = 0
    """Images with a shorter side below this are left out."""
    max_aspect: float | None = None
    """Images with longer side / shorter side above this are left out; None is no limit."""
    duplicates: Duplicates = "keep"
    """`exact`: an image file seen before is left out; `near`: also one that looks the same."""
    exclude: tuple[str, ...] = ()
    """Folders, shards or known sets of evaluation images; whatever looks like one of them is left out."""

    def __post_init__(self) -> None:
        _check_least("max-caption-chars", self.max_caption_chars, 1)
        _check_least("max-caption-repeats", self.max_caption_repeats, 1)
        _check_least("max-aspect", self.max_aspect, 1)
        require(
            self.max_caption_chars is None or self.min_caption_chars <= self.max_caption_chars,
            "--min-caption-chars must not exceed --max-caption-chars "
            f"(got {self.min_caption_chars}, {self.max_caption_chars})",
            remedy="swap them",
        )

    @property
    def needs_perceptual_hash(self) -> bool:
        """Return whether images must be compared by perceptual hashes."""
        return self.duplicates == "near" or bool(self.exclude)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareConfig:
    """One run of `declip prepare`."""

    source: str
    """Folder, file, tar pattern or fsspec URL."""
    out: str
    """Folder or fsspec URL for the shards."""
    kind: SourceKind | None = None
    """What the source is; None looks at it."""
    image_column: str = ""
    caption_columns: tuple[str, ...] = ()
    images: str = ""
    """Folder that the file names of a list start from; empty looks beside the list."""
    image_side_px: int = 256
    """Larger images are made smaller so that their shorter side is this; smaller ones stay as they are."""
    quality: int = 95
    """JPEG quality of images that are encoded again; as img2dataset."""
    shard_samples: int = 10_000
    """Pairs per shard; as img2dataset."""
    workers: int = 0
    """Threads, or with Ray tasks at a time; 0 uses all available cores."""
    max_bad: float = 0.05
    """Largest share of unreadable pairs before the command stops."""
    split: dict[str, float] = field(default_factory=dict)
    """Split → fraction of all pairs that goes there instead of the training split, by a hash of the key."""
    engine: Engine = "threads"
    force: bool = False
    """Replace an output folder made by another command."""
    clean: CleanConfig = CleanConfig()

    def __post_init__(self) -> None:
        _check_least("image-side-px", self.image_side_px, 16)
        _check_least("shard-samples", self.shard_samples, 1)
        _check_least("workers", self.workers, 0)
        require(1 <= self.quality <= 100, f"--quality is in [1, 100] (got {self.quality})", remedy="--quality 95")
        shares = {"--max-bad ": self.max_bad} | {f"--split {split}=": share for split, share in self.split.items()}
        for option, share in shares.items():
            require(0 <= share <= 1, f"{option[:-1]} is a fraction in [0, 1] (got {share})", remedy=f"{option}0.05")
        require(
            sum(self.split.values()) < 1.0,
            f"--split leaves nothing for the training split (got {self.split})",
            remedy="--split val=0.01",
        )
        for split in self.split:
            require(
                split.isidentifier() and split != "train",
                f"--split wants NAME=FRACTION with a plain name other than train (got {split!r})",
                remedy="--split val=0.01",
            )
