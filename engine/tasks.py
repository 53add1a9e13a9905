"""The table of the six tasks. Every other file asks this table what a task means; none spells a task out again.

A task fixes what instructs the model, which loss trains it and what the test compares (the paper's Sec. 4.1, Eq. 7-8).
"""

from __future__ import annotations

from typing import Literal, NamedTuple


class Task(NamedTuple):
    """One row.

    name         key in `metrics.json` and `--tasks`
    title        the paper's name
    instruction  "sentence": one of 20 fixed sentences for query and gallery alike; "clothes": a picture of the clothes;
                 "description": sentences about one image; "query": the sentences *are* the query, images carry nothing
    loss         "identity" (Eq. 7) or "matching" (Eq. 8)
    cross_modal  batches hold both modalities of a person in equal parts, and colours are now and then taken away
    gain         `--check` asks for this much: (mAP - b) / (1 - b), b the better of chance and the untrained network
    """

    name: str
    title: str
    instruction: Literal["sentence", "clothes", "description", "query"]
    loss: Literal["identity", "matching"]
    cross_modal: bool = False
    gain: float = 0.2


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("trad", "Trad-ReID", "sentence", "identity"),
        Task("cc", "CC-ReID", "sentence", "identity", gain=0.1),
        Task("ctcc", "CTCC-ReID", "clothes", "identity"),
        Task("vi", "VI-ReID", "sentence", "identity", cross_modal=True, gain=0.1),
        Task("t2i", "T2I-ReID", "query", "matching"),
        Task("li", "LI-ReID", "description", "identity"),
    )
}
