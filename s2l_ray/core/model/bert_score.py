"""BERTScore (Zhang et al. 2020, "BERTScore: Evaluating Text Generation with BERT"): F1, neither
rescaled nor weighted by idf.

Each token of one text is matched with the most similar one of the other, by the cosine of their
hidden states. Tokens that the tokenizer adds do not count.
"""

from collections.abc import Sequence
from typing import Any

import torch

from s2l_ray.config import Model
from s2l_ray.core.model.places import pretrained
from s2l_ray.errors import UserError

TEXTS_AT_ONCE, MOST_TOKENS = 32, 512


class BertScore:
    """Compares texts by the hidden states of one model.

    Args:
        layer: whose output is compared, from 1; None: the last.

    Raises:
        UserError: the model cannot be loaded, or has no such layer.
    """

    def __init__(self, model: Model, layer: int | None, device: Any) -> None:
        from transformers import AutoModel, AutoTokenizer

        place, options = pretrained(model)
        self.device = device
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(
                place, trust_remote_code=False, **options
            )
            self.model = AutoModel.from_pretrained(
                place, trust_remote_code=False, use_safetensors=True, **options
            )
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"loading evaluation.bert_model {place}: {error}. Name a model with safetensors "
                "and a tokenizer."
            ) from None
        layers = self.model.config.num_hidden_layers
        self.layer = layers if layer is None else layer
        if self.layer > layers:
            raise UserError(
                f"loading evaluation.bert_model {place}: evaluation.bert_layer is {layer}, but it "
                f"has {layers} layers. Lower bert_layer."
            )
        self.model.to(device).eval()

    def f1(self, answers: Sequence[str], golds: Sequence[str]) -> list[float]:
        """F1 of each answer against its gold text; 0 where one has no token."""
        texts = [*answers, *golds]
        states: list[torch.Tensor] = []
        for first in range(0, len(texts), TEXTS_AT_ONCE):
            states += self._states(texts[first : first + TEXTS_AT_ONCE])
        pairs = zip(states[: len(answers)], states[len(answers) :], strict=True)
        return [_f1(answer, gold) for answer, gold in pairs]

    def _states(self, texts: Sequence[str]) -> list[torch.Tensor]:
        """Hidden states of length 1 of each text's own tokens: [tokens, H]."""
        most = min(MOST_TOKENS, self.tokenizer.model_max_length)
        encoded = self.tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=most,
            return_special_tokens_mask=True,
            return_tensors="pt",
        )
        added_BL = encoded.pop("special_tokens_mask").bool() | ~encoded["attention_mask"].bool()
        with torch.inference_mode():
            made = self.model(**encoded.to(self.device), output_hidden_states=True)
        states_BLH = torch.nn.functional.normalize(made.hidden_states[self.layer].float(), dim=-1)
        return [states[~added] for states, added in zip(states_BLH.cpu(), added_BL, strict=True)]


def _f1(answer_AH: torch.Tensor, gold_GH: torch.Tensor) -> float:
    if not len(answer_AH) or not len(gold_GH):
        return 0.0
    similar_AG = answer_AH @ gold_GH.T
    precision, recall = similar_AG.amax(1).mean().item(), similar_AG.amax(0).mean().item()
    total = precision + recall
    return 2 * precision * recall / total if total > 0 else 0.0
