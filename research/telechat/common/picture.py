"""Pictures of runs and data sets: one look, readable in black and white, with English or Chinese words.

matplotlib is imported when a picture is drawn, without pyplot and its state. Lines differ by their dashes and markers
and not by their color alone.
"""
import contextlib
import io
from pathlib import Path
from typing import TYPE_CHECKING, Dict, Iterator, Optional, Tuple

from research.telechat.common.files import whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MADE_BY = "TeleChat for MindFormers"         # in the pictures themselves
LANGUAGES = ("en", "zh")
DARK, LIGHT, ACCENT = "#14385f", "#9db7d1", "#b3261e"        # they differ in brightness as well
_CHINESE_FONTS = ("Noto Sans CJK SC", "Source Han Sans SC", "Source Han Sans CN", "Noto Sans SC", "WenQuanYi Micro Hei",
                  "WenQuanYi Zen Hei", "Microsoft YaHei", "SimHei", "PingFang SC", "Heiti SC", "Noto Serif CJK SC",
                  "Noto Sans CJK JP", "AR PL UMing CN", "Droid Sans Fallback")


def chinese_font() -> Optional[str]:
    """An installed font that has the Chinese characters; None where there is none."""
    from matplotlib.font_manager import fontManager
    installed = {font.name for font in fontManager.ttflist}
    return next((name for name in _CHINESE_FONTS if name in installed), None)


class Words:
    """Titles and labels in one language; English for those without a translation."""

    def __init__(self, chinese: Dict[str, str], use_chinese: bool):
        self._chinese = chinese if use_chinese else {}

    def __call__(self, text: str, **values: object) -> str:
        """`text` in the language of the picture, with `values` filled in."""
        return self._chinese.get(text, text).format(**values)


def prepare_drawing() -> None:
    """Import what `drawing` needs, if it is there, which takes a second."""
    with contextlib.suppress(ImportError):
        import matplotlib.backends.backend_agg
        import matplotlib.figure  # noqa: F401


@contextlib.contextmanager
def drawing(size: Tuple[float, float], chinese: Dict[str, str], language: str = "en"
            ) -> Iterator[Tuple["Figure", Words]]:
    """An empty figure of `size` in inches, and its words.

    Args:
        chinese: translation of every English title and label.
        language: one of LANGUAGES; without a Chinese font the words stay English, and a line on the picture says so.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    font = chinese_font() if language == "zh" else None
    fonts = [font] if font else []
    with matplotlib.rc_context({"font.sans-serif": [*fonts, "DejaVu Sans"], "axes.unicode_minus": not fonts,
                                "axes.axisbelow": True,
                                "axes.titlesize": 10, "axes.labelsize": 9, "legend.fontsize": 8, "axes.grid": True,
                                "grid.alpha": 0.3, "xtick.labelsize": 8, "ytick.labelsize": 8}):
        figure = Figure(figsize=size, dpi=110)
        FigureCanvasAgg(figure)
        if language == "zh" and not font:
            figure.text(0.995, 0.005, f"no Chinese font is installed (looked for {_CHINESE_FONTS[0]} and others)",
                        ha="right", va="bottom", fontsize=6)
        yield figure, Words(chinese, font is not None)


def png(figure: "Figure") -> bytes:
    """The figure as the content of a PNG file."""
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": MADE_BY})
    return buffer.getvalue()


def save(figure: "Figure", path: Path) -> None:
    """Write the figure as a PNG file, atomically. Raises OSError."""
    with whole(path) as beside:
        beside.write_bytes(png(figure))


def is_ours(path: Path) -> bool:
    """Whether a file is a picture that `png` has made."""
    try:
        with open(path, "rb") as file:
            return f"Software\0{MADE_BY}".encode() in file.read(1024)
    except OSError:
        return False
