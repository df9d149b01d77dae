"""Tune the prompts of a frozen CLIP on a few labelled photos.

from capt_train.config import TrainConfig
from capt_train.pipeline import train
config = TrainConfig(data="photos", model="ViT-B-16-quickgelu", pretrained="openai")
report = train(config, "runs/mine")
"""
