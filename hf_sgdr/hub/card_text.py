"""The lines of a model card that name its model, so that a card that was written before a push is right after it."""

import re

# Where the model is, as long as nobody has pushed it.
PLACEHOLDER = "user/name"


def put_model_id(card: str, model_id: str) -> str:
    """The text of a card with a model's id on the Hub in the lines that load it.

    Args:
        card (`str`): the content of a `README.md` that [`~hf_sgdr.hub.card.write_model_card`] wrote; in others
            nothing changes.
        model_id (`str`): such as "user/name".
    """
    card = re.sub(r'(pipeline\("image-classification", model=)"[^"\n]*"', rf'\1"{model_id}"', card)
    card = re.sub(r'(hf_sgdr\.pipeline\()"[^"\n]*"', rf'\1"{model_id}"', card)
    return re.sub(rf"^`{PLACEHOLDER}` stands for .*\n\n", "", card, flags=re.MULTILINE)
