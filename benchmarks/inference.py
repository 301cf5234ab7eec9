"""Prediction: images a second of hf_sgdr's pipeline and of transformers' own, from a folder of files to answers."""

import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import transformers
from PIL import Image
from timing import Row, medians

import hf_sgdr
from hf_sgdr.demo import DEMO_MODEL, demo_weights_file

STOCK_IMAGES, LARGE_IMAGES, LARGE = 64, 8, (4000, 3000)


def inference(files: list[Path], repetitions: int) -> list[Row]:
    """Images a second, on the same device; transformers' pipeline runs in a process of its own, as its user has it."""
    with tempfile.TemporaryDirectory() as place:
        model = hf_sgdr.create_image_classifier(DEMO_MODEL, labels=["a", "b"], weights_file=demo_weights_file())
        model.save_pretrained(Path(place, "model"))
        large = [_enlarged(file, Path(place, f"{i}.jpg")) for i, file in enumerate(files[:LARGE_IMAGES])]
        stock = _stock(place, files[:STOCK_IMAGES], large, repetitions)
        pipe = hf_sgdr.pipeline(Path(place, "model"))
        in_part = hf_sgdr.pipeline(Path(place, "model"), exact=False)
        names, large_names = [str(file) for file in files], [str(file) for file in large]
        seconds = medians(
            {
                "images": lambda: pipe(names),
                "images, tta": lambda: pipe(names[:STOCK_IMAGES], tta=4),
                "large": lambda: pipe(large_names),
                "large in part": lambda: in_part(large_names),
            },
            repetitions,
        )
    rate = len(files) / seconds["images"]
    views = 5 * STOCK_IMAGES / seconds["images, tta"]
    exact, part = (len(large) / seconds[name] for name in ("large", "large in part"))
    ours, megapixels = "prediction of a folder", f"images of {LARGE[0] * LARGE[1] // 10**6} megapixels"
    return [
        (ours, "transformers' pipeline as it comes", rate, stock["images, 1"]),
        (ours, "transformers' pipeline, batch_size=32", rate, stock["images, 32"]),
        (f"{ours}, tta=4, views", "transformers' pipeline as it comes, images", views, stock["images, 1"]),
        (f"{ours}, {megapixels}", "transformers' pipeline as it comes", exact, stock["large, 1"]),
        (f"{ours}, {megapixels}, exact=False", "transformers' pipeline as it comes", part, stock["large, 1"]),
    ]


def _enlarged(file: Path, path: Path) -> Path:
    Image.open(file).convert("RGB").resize(LARGE, Image.Resampling.BICUBIC).save(path, quality=90)
    return path


def _stock(place: str, files: list[Path], large: list[Path], repetitions: int) -> dict[str, float]:
    words = [place, str(repetitions), str(len(files)), *map(str, files), *map(str, large)]
    output = subprocess.run([sys.executable, __file__, *words], check=True, stdout=subprocess.PIPE, text=True).stdout
    return dict(json.loads(output.splitlines()[-1]))


def _measure_stock() -> None:
    place, repetitions, number, *files = sys.argv[1:]
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    pipe = transformers.pipeline("image-classification", model=str(Path(place, "model")))
    images, large = files[: int(number)], files[int(number) :]
    seconds = medians(
        {
            "images, 1": lambda: pipe(images),
            "images, 32": lambda: pipe(images, batch_size=32),
            "large, 1": lambda: pipe(large),
        },
        int(repetitions),
    )
    rates = {name: len(large if name.startswith("large") else images) / value for name, value in seconds.items()}
    print(json.dumps(rates))


if __name__ == "__main__":
    _measure_stock()
