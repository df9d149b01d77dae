"""The data sets of the field: folders, prompts, and where to get what is missing.

Folders and lists are those of CoOp (https://github.com/KaiyangZhou/CoOp, DATASETS.md), which all
later papers share; the prompts are those of its code for the hand-written baseline.
"""

from dataclasses import dataclass
from pathlib import Path

from capt_deploy.core.errors import DataError

_LISTS = "https://github.com/KaiyangZhou/CoOp/blob/main/DATASETS.md"
_PHOTO = "a photo of a {}."


@dataclass(frozen=True)
class FieldDataset:
    """A data set that papers report."""

    folder: str  # below the root of all data sets
    needed: tuple[str, ...]  # files and folders inside, without which it cannot be read
    template: str
    source: str  # where the photos come from

    def path(self, root: Path) -> Path:
        """Return the folder.

        Raises:
            DataError: something is missing; the message says what, and where to get it.
        """
        folder = root / self.folder
        missing = [name for name in self.needed if not (folder / name).exists()]
        if missing:
            raise DataError(
                f"{folder}: expected {', '.join(missing)}; get the photos from {self.source} and "
                f"lay them out with their lists as {_LISTS} says"
            )
        return folder


DATASETS: dict[str, FieldDataset] = {
    "imagenet": FieldDataset(
        "imagenet",
        ("classnames.txt", "images/train", "images/val"),
        _PHOTO,
        "https://image-net.org/download-images",
    ),
    "caltech101": FieldDataset(
        "caltech-101",
        ("101_ObjectCategories", "split_zhou_Caltech101.json"),
        _PHOTO,
        "https://data.caltech.edu/records/mzrjq-6wc02",
    ),
    "oxford_pets": FieldDataset(
        "oxford_pets",
        ("images", "split_zhou_OxfordPets.json"),
        "a photo of a {}, a type of pet.",
        "https://www.robots.ox.ac.uk/~vgg/data/pets",
    ),
    "stanford_cars": FieldDataset(
        "stanford_cars",
        ("cars_train", "cars_test", "split_zhou_StanfordCars.json"),
        _PHOTO,
        "https://ai.stanford.edu/~jkrause/cars/car_dataset.html",
    ),
    "oxford_flowers": FieldDataset(
        "oxford_flowers",
        ("jpg", "split_zhou_OxfordFlowers.json"),
        "a photo of a {}, a type of flower.",
        "https://www.robots.ox.ac.uk/~vgg/data/flowers/102",
    ),
    "food101": FieldDataset(
        "food-101",
        ("images", "split_zhou_Food101.json"),
        "a photo of {}, a type of food.",
        "https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101",
    ),
    "fgvc_aircraft": FieldDataset(
        "fgvc_aircraft",
        ("images", *(f"images_variant_{split}.txt" for split in ("train", "val", "test"))),
        "a photo of a {}, a type of aircraft.",
        "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft",
    ),
    "sun397": FieldDataset(
        "sun397",
        ("SUN397", "split_zhou_SUN397.json"),
        _PHOTO,
        "https://vision.princeton.edu/projects/2010/SUN",
    ),
    "dtd": FieldDataset(
        "dtd",
        ("images", "split_zhou_DescribableTextures.json"),
        "{} texture.",
        "https://www.robots.ox.ac.uk/~vgg/data/dtd",
    ),
    "eurosat": FieldDataset(
        "eurosat",
        ("2750", "split_zhou_EuroSAT.json"),
        "a centered satellite photo of {}.",
        "https://github.com/phelber/EuroSAT",
    ),
    "ucf101": FieldDataset(
        "ucf101",
        ("UCF-101-midframes", "split_zhou_UCF101.json"),
        "a photo of a person doing {}.",
        "https://www.crcv.ucf.edu/data/UCF101.php",
    ),
    "imagenetv2": FieldDataset(
        "imagenetv2",
        ("classnames.txt", "imagenetv2-matched-frequency-format-val"),
        _PHOTO,
        "https://github.com/modestyachts/ImageNetV2",
    ),
    "imagenet_sketch": FieldDataset(
        "imagenet-sketch",
        ("classnames.txt", "images"),
        _PHOTO,
        "https://github.com/HaohanWang/ImageNet-Sketch",
    ),
    "imagenet_a": FieldDataset(
        "imagenet-adversarial",
        ("classnames.txt", "imagenet-a"),
        _PHOTO,
        "https://github.com/hendrycks/natural-adv-examples",
    ),
    "imagenet_r": FieldDataset(
        "imagenet-rendition",
        ("classnames.txt", "imagenet-r"),
        _PHOTO,
        "https://github.com/hendrycks/imagenet-r",
    ),
}
