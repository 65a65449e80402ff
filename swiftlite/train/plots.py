"""The run's curves as PNG files, from its log rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

CURVES = {
    "train_loss": ("loss", "training loss"),
    "token_acc": ("token_acc", "training token accuracy"),
    "learning_rate": ("learning_rate", "learning rate"),
    "grad_norm": ("grad_norm", "gradient norm"),
    "tokens_per_s": ("tokens_per_s", "tokens per second"),
    "eval_loss": ("eval_loss", "evaluation loss"),
    "eval_token_acc": ("eval_token_acc", "evaluation token accuracy"),
    "eval_exact_match": ("eval_exact_match", "evaluation: exact matches of generated answers"),
    "eval_rouge-l": ("eval_rouge-l", "evaluation: ROUGE-L of generated answers"),
}
SMOOTHED = ("train_loss", "grad_norm", "tokens_per_s")
RAW, SMOOTH = "#FFCDB8", "#E8552B"


def smooth(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average without the bias towards the start (Adam's correction)."""
    out: list[float] = []
    average = 0.0
    for count, value in enumerate(values, 1):
        average = weight * average + (1 - weight) * value
        out.append(average / (1 - weight**count))
    return out


def draw(rows: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """One PNG per curve that the rows hold; where they cannot be written, that is said: the run itself is whole by then."""
    try:
        return _draw(rows, folder)
    except OSError as error:
        print(f"note: no curves in {folder}: {error.strerror}")
        return []


def _draw(rows: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, (key, title) in CURVES.items():
        points = [(row["global_step"], row[key]) for row in rows if key in row and "global_step" in row]
        if not points:
            continue
        steps, values = zip(*points, strict=True)
        figure = Figure(figsize=(8, 5), dpi=100, layout="tight")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        if name in SMOOTHED:
            axes.plot(steps, values, color=RAW, label="as logged")
            axes.plot(steps, smooth(values), color=SMOOTH, label="smoothed")
            axes.legend()
        else:
            axes.plot(steps, values, color=SMOOTH, marker="o" if len(points) < 40 else None, markersize=3)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        figure.savefig(folder / f"{name}.png")
        drawn.append(folder / f"{name}.png")
    return drawn
