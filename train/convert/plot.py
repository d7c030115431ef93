"""The loss curve as an image file of its own, for the model card."""

from train.charts import Series, line_chart, smoothed
from train.report import Run
from train.report_style import CSS


def loss_plot(run: Run, step: int) -> str | None:
    """A stand-alone SVG of training and held-out loss up to a step; None where the run has no metrics."""
    training = [(record["step"], record.get("loss")) for record in run.metrics if record["step"] <= step]
    held_out = [(record["step"], record.get("loss")) for record in run.validation if record["step"] <= step]
    figure = line_chart(
        "Loss by step", [Series("training", smoothed(training), 1), Series("held-out", held_out, 2, "dots")]
    )
    if not figure:
        return None
    drawing = figure[figure.index("<svg ") : figure.index("</figure>")]
    # The report's charts take their colours from the page's style sheet; alone, the image carries it.
    start, _, rest = drawing.partition(">")
    return f'{start} xmlns="http://www.w3.org/2000/svg" class="chart"><style>{CSS}</style>{rest}'
