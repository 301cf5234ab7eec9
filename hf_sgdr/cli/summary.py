"""What is said of a run at its end: its table on the terminal, and the facts of its card that nobody can measure."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_sgdr._utils.text import printable
from hf_sgdr.cli.arguments import DataArguments, ModelArguments, RecipeArguments
from hf_sgdr.demo import ORIGIN
from hf_sgdr.hub.card_facts import hub_id, local_origin
from hf_sgdr.hub.recipe_file import RECIPE_FILE, train_command
from hf_sgdr.inference.evaluation import Evaluation
from hf_sgdr.inference.interpretation import ClassifierInterpretation
from hf_sgdr.recipe import FitRecord, RunResults
from hf_sgdr.training.arguments import SGDRTrainingArguments

MOST_CLASSES = 40


def print_summary(results: RunResults, training: SGDRTrainingArguments) -> None:
    """Print the table of stages, the best one marked, best weights, test-time augmentation, and what to do next."""
    names = results.metrics
    shown = "".join(f"{'bal. acc.' if name == 'balanced_accuracy' else name:>10}" for name in names)
    print(f"\n{'stage':<14}{'epochs':>7}{'train loss':>12}{'valid loss':>12}{shown}{'seconds':>9}")
    for stage in results.rows:
        print(
            f"{stage['name']:<14}{stage['epochs']:>7}{_metric(stage['train_loss'])}{_metric(stage['eval_loss'])}"
            f"{_metrics(stage, names)}{stage['seconds']:>9.1f}{' *' if _is_best(stage, results) else ''}"
        )
    if training.max_steps > 0:
        print(f"each fit ended after {training.max_steps} steps (--max_steps)")
    best = results.best
    at = f"{best['stage']}, epoch {best['epoch']:g}" if best["epoch"] else best["stage"]
    why = "lowest valid loss" if training.best_by == "loss" else f"highest {training.best_by}"
    print(f"{'best':<33}{_metric(best['eval_loss'])}{_metrics(best, names)}   {why}: {at}")
    if tta := {f"eval_{name}": value for name, value in results.tta.items()}:
        share = tta.get("eval_plain_weight")
        note = f"   the plain image's share is {share:.2f}" if share is not None else ""
        note += ": views do not help" if share == 1 else ""
        print(f"{'with TTA':<33}{_metric(tta['eval_loss'])}{_metrics(tta, names)}{note}")
    out = printable(shlex.quote(str(training.output_dir)))
    print(f"\nModel, card, plots and results.json are in {out}. Next:")
    print(f"  hf-sgdr predict --model {out} IMAGES                                  # labels of other images")
    print(f"  hf-sgdr report --model {out} --data_dir FOLDER --output report.html   # how good it is on a folder")
    print(f"  hf-sgdr push {out} user/name --push_space                             # share it, with a page to try it")


def print_evaluation(evaluation: Evaluation) -> None:
    """Print the metrics of an evaluation, class by class where there are few, and its most frequent mistakes."""
    result = evaluation.result
    print(f"\n{printable(evaluation.model)} on {len(result.labels)} images: {printable(evaluation.images)}")
    print(evaluation.seen_before())
    for name, value in evaluation.metrics.items():
        print(f"{name:<18}{value:8.4f}")
    reports = [report for report in result.per_class() if report.images or report.precision is not None]
    if len(reports) <= MOST_CLASSES:
        width = max(5, *(len(printable(report.name)) for report in reports))
        print(f"\n{'class':<{width}}{'images':>8}{'precision':>11}{'recall':>9}{'f1':>9}")
        for report in reports:
            metrics = "".join(_metric(value, 9) for value in (report.precision, report.recall, report.f1))
            print(f"{printable(report.name):<{width}}{report.images:>8}  {metrics}")
    if isinstance(result, ClassifierInterpretation) and (mistakes := result.most_confused()):
        print("\nmost confused: " + "; ".join(f"{printable(t)} as {printable(p)}: {n}" for t, p, n in mistakes[:5]))


def stated_facts(
    data: DataArguments, model: ModelArguments, recipe: RecipeArguments, is_demo: bool, processes: int = 1
) -> dict[str, Any]:
    """What the arguments say for [`~hf_sgdr.hub.card.write_model_card`]."""
    facts: dict[str, Any] = {"tta_views": recipe.n_aug, "license": recipe.license, "with_images": recipe.card_photos}
    images = data.dataset_name or data.labels_file or data.data_dir or ""
    dataset = hub_id(data.dataset_name or "", with_user=False)
    facts |= {"dataset": dataset, "images_name": dataset or Path(images).resolve().name}
    if is_demo:
        license = recipe.license or "apache-2.0"  # that of the weights and of this package
        return {**facts, "license": license, "command": "hf-sgdr demo", "origin": ORIGIN, "with_images": True}
    command = f"{train_command(processes)} {RECIPE_FILE}"
    for flag, is_needed in {
        "IMAGES": dataset is None,
        "--labels_file TABLE": data.labels_file is not None,
        "--weights_file WEIGHTS": model.weights_file is not None,
        "--model MODEL": Path(model.model_name_or_path).is_dir(),
    }.items():
        command += f" {flag}" if is_needed else ""
    origin = local_origin(model.model_name_or_path, model.weights_file, model.pretrained)
    return {**facts, "command": command, "origin": origin}


def _is_best(stage: FitRecord, results: RunResults) -> bool:
    """Whether the best weights are of this stage, those of its average too."""
    return results.best["stage"] in (stage["name"], f"{stage['name']} (average)")


def _metrics(record: Mapping[str, Any], names: Sequence[str]) -> str:
    return "".join(_metric(record.get(f"eval_{name}"), 10) for name in names)


def _metric(value: float | None, width: int = 12) -> str:
    """A metric in its column; a fit that ends early may have no training loss."""
    return f"{'–' if value is None else f'{value:.4f}':>{width}}"
