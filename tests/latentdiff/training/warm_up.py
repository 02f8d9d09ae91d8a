"""Imported by the fork server: what every training process would otherwise do again."""

import tempfile

import torch
from transformers import BertConfig, BertModel

torch.set_num_threads(1)  # a pool of threads would not survive the fork
with tempfile.TemporaryDirectory() as folder:  # the first save of a BERT compiles 899 regular expressions
    BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
                         vocab_size=8)).save_pretrained(folder)  # fmt: skip
