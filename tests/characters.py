"""A tokenizer of single characters, with ids that the tiny models of `tiny` know."""

import torch


class CharacterTokenizer:
    """Printable ASCII and the line break, but no tilde."""

    bos_token_id = None

    def __call__(self, text: str | list[str], **kwargs: object) -> dict[str, list]:
        if isinstance(text, list):
            return {"input_ids": [self(one)["input_ids"] for one in text]}
        return {"input_ids": [2 if c == "\n" else ord(c) - 29 for c in text]}

    def decode(self, ids: torch.Tensor | int) -> str:
        return "".join("\n" if i == 2 else chr(i + 29) for i in torch.as_tensor(ids).flatten().tolist())
