"""Tune the prompts of a frozen CLIP on a few labelled photos.

from capt_train.config import TrainConfig
from capt_train.pipeline import train
report = train(TrainConfig(data="photos", model="ViT-B-16-quickgelu", pretrained="openai"), "runs/mine")
"""
