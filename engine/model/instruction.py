"""Instruction encoder E_i: a BERT tower for sentences and a ViT tower for clothes pictures, one output width.

Shapes: T instructions (one per image, or 1 for the whole batch), M tokens (CLS first), E = instruction width.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from engine.config import ModelConfig
from engine.model.editing import EditingTransformer


class Instruction(NamedTuple):
    """F_T. tokens [T, M, E]; lengths [T] int64 valid tokens, None = all; cls [T, E]."""

    tokens: Tensor
    lengths: Tensor | None
    cls: Tensor


class InstructionEncoder(nn.Module):
    """Sentences or clothes pictures -> Instruction.

    frozen  towers ("text", "picture") that stay as they are, see `freeze`
    known   what a frozen text tower made of sentences that serve whole batches: 60 in all, the tasks' fixed ones
    """

    def __init__(self, config: ModelConfig, vocabulary: int):
        super().__init__()
        width = config.instruction_width
        self.text = BertModel(
            BertConfig(
                vocab_size=vocabulary,
                hidden_size=width,
                num_hidden_layers=config.text_depth,
                num_attention_heads=config.text_heads,
                intermediate_size=4 * width,
                max_position_embeddings=512,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                initializer_range=width**-0.5,  # BERT's 0.02 leaves narrow towers nearly constant at the start
            ),
            add_pooling_layer=False,
        )
        self.picture = EditingTransformer(
            size=config.clothes_size,
            patch=config.patch,
            stem="given" if config.shared_stem else config.stem,
            width=width,
            depth=config.picture_depth,
            heads=config.text_heads,
            cls_stem=config.cls_stem,
            fused=config.fused,
        )
        self.frozen: tuple[str, ...] = ()
        self.known: dict[tuple, Instruction] = {}
        self.register_load_state_dict_post_hook(_forget)

    def freeze(self, *towers: str) -> None:
        """No gradients for these towers as well, and evaluation mode for good."""
        self.frozen = tuple(sorted({*self.frozen, *towers}))
        for name in towers:
            self.get_submodule(name).requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> InstructionEncoder:
        super().train(mode)
        for name in self.frozen:
            self.get_submodule(name).eval()
        return self

    def _apply(self, *arguments: Any, **options: Any) -> InstructionEncoder:
        """Every change of device or type comes through here."""
        self.known.clear()
        return super()._apply(*arguments, **options)

    def of_text(self, ids: Tensor, lengths: Tensor) -> Instruction:
        """ids [T, L] int64, lengths [T] int64."""
        if "text" not in self.frozen or len(ids) > 1:
            return self._encode(ids, lengths)
        key = *ids[0].tolist(), lengths.item(), ids.device, torch.is_autocast_enabled(ids.device.type)
        if key not in self.known:
            with torch.inference_mode(False):  # whoever asks first: training may use it later
                self.known[key] = self._encode(ids, lengths)
        return self.known[key]

    def _encode(self, ids: Tensor, lengths: Tensor) -> Instruction:
        mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        tokens = self.text(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        return Instruction(tokens, lengths, tokens[:, 0])

    def of_clothes(self, pictures: Tensor, stem: nn.Module | None = None) -> Instruction:
        """pictures [T, 3, h, w] float; stem: E_e's, where the tower has none of its own."""
        tokens = self.picture(pictures, stem=stem)
        return Instruction(tokens, None, tokens[:, 0])


def _forget(encoder: InstructionEncoder, _: Any) -> None:
    """After other weights were loaded."""
    encoder.known.clear()


SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def build_tokenizer(sentences: Iterable[str], words: int = 30000) -> Tokenizer:
    """A WordPiece tokenizer over this corpus: its most frequent words whole, everything else by characters.

    Deterministic (ties by spelling), so that every rank and every rerun has the same vocabulary.
    """
    count: collections.Counter[str] = collections.Counter()
    normalize, split = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    for sentence in sentences:
        count.update(word for word, _ in split.pre_tokenize_str(normalize.normalize_str(sentence)))
    characters = sorted({character for word in count for character in word})
    frequent = [word for word, _ in sorted(count.items(), key=lambda item: (-item[1], item[0]))][:words]
    pieces = [*SPECIAL, *characters, *(f"##{character}" for character in characters)]
    return wordpiece({piece: number for number, piece in enumerate(dict.fromkeys([*pieces, *frequent]))})


def wordpiece(vocabulary: dict[str, int], lowercase: bool = True) -> Tokenizer:
    """BERT's tokenizer over this vocabulary, which holds SPECIAL."""
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")]
    )
    return tokenizer


def tokenize(tokenizer: Tokenizer, sentences: list[str], longest: int) -> tuple[Tensor, Tensor]:
    """ids [T, L] int64 padded with 0 and lengths [T] int64; L = the longest of the batch, at most `longest`."""
    rows = [encoding.ids for encoding in tokenizer.encode_batch(sentences)]
    rows = [row if len(row) <= longest else [*row[: longest - 1], row[-1]] for row in rows]
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
    return ids, lengths
