"""How a model's conversations are written, for what reads or writes them beside the running parts."""

from pathlib import Path
from typing import NamedTuple

from fedhlm.answering import Offer
from fedhlm.decoding.chat import TurnIds
from fedhlm.decoding.hub import configured_begin, end_ids
from fedhlm.decoding.models import CONTEXT_MAX, described, is_hub_folder, tokenizer_at
from fedhlm_doors.chat import ChatTemplate


class Speech(NamedTuple):
    """The template of a model (None: it has none), the ids around turns, and the ids that end its texts.

    Without a template a text begins with the begin-of-text id, or after the id that ends another.
    """

    template: ChatTemplate | None
    turns: TurnIds
    end_ids: tuple[int, ...]


def speech_of(model: Path) -> Speech:
    """Read how a model folder or GGUF file writes conversations.

    Raises:
        ModelError: it cannot be used, or its template changes turns.
    """
    if is_hub_folder(str(model)):
        begin, ends = configured_begin(model), end_ids(model)
    else:
        info, _ = described(model)
        begin, ends = info.bos_id, info.eos_ids
    offer = Offer(model.name, model, tokenizer_at(model)[0], begin, CONTEXT_MAX)
    template = ChatTemplate.of(offer)
    if template is not None:
        return Speech(template, template.turns(), ends)
    first = ends[0] if begin is None else begin
    return Speech(None, TurnIds((first,), (ends[0],), (ends[0],)), ends)
