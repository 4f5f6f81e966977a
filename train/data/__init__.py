"""Data: from files of records to batches of tokens, and what of them is learned."""

from train.data.config import DataConfig
from train.data.dataset import Dataset, load_data
from train.data.preview import preview
from train.data.tokenized import padding_id

__all__ = ["DataConfig", "Dataset", "load_data", "padding_id", "preview"]
