"""A service over a classroom's pair and store, its requests, and adapters that could be promoted."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from draftloop.answers import Completion, Request
from draftloop.backends.architecture import read_architecture
from draftloop.backends.lora import Lora, LoraModule, LoraSpec, new_lora
from draftloop.learning.recorder import Provenance
from draftloop.loading import open_storage
from draftloop.models.adapter_files import write_adapter
from draftloop.models.tokenizer import Message
from draftloop.server.service import Service, open_service
from draftloop.server.tickets import Job
from draftloop.storage.records import AdapterRecord, AdapterStatus
from draftloop.types import Sampling

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pupils import Classroom

METRICS = {
    "gain": 0.0883,
    "gain_ci95": [0.051, 0.12],
    "alpha_before": 0.7,
    "alpha_after": 0.75,
    "tau_before": 2.95,
    "tau_after": 3.21,
}


def serve_classroom(classroom: Classroom, **changes: object) -> Service:
    """The service; `changes` are settings, two underscores stand for a dot."""
    config = classroom.config(backend="numpy", **changes)
    store = open_storage(config, read_only=not config.storage.collect)
    return open_service(config, classroom.engine(store, **changes), store)


def add_adapter(classroom: Classroom, name: str, *, promoted: bool = False) -> None:
    """An adapter with its files, as a training run would leave it."""
    spec, random = LoraSpec(2, 4.0, ("down_proj",)), np.random.default_rng(int(name[1:]))
    fresh = new_lora(read_architecture(classroom.folder / "draft"), spec, 0)
    modules = {
        key: LoraModule(one.a, random.normal(0, 0.1, one.b.shape).astype(np.float32))
        for key, one in fresh.modules.items()
    }
    folder = classroom.data / "adapters" / name
    write_adapter(folder, Lora(spec, modules), base_model="./draft", facts={"name": name})
    with classroom.store() as store:
        reason = f"{name} was judged"
        record = AdapterRecord(
            name, classroom.pair, None, 1.7e9, AdapterStatus.REJECTED, "unfused", None, reason, METRICS
        )
        store.adapters.add(record)
        if promoted:
            store.adapters.promote(name, reason=f"{name} is better")


@contextmanager
def taught_service(classroom: Classroom) -> Iterator[Service]:
    """A service whose draft wears a0001; a0002 was rejected."""
    add_adapter(classroom, "a0001", promoted=True)
    add_adapter(classroom, "a0002")
    service = serve_classroom(classroom)
    assert service.store is not None
    with service.store:
        yield service


@dataclass(frozen=True, slots=True)
class Asker:
    """Asks a service as a client would, on its event loop."""

    service: Service

    async def __call__(self, text: str, *, stored: bool = True) -> Completion:
        """The end of the answer to one message."""
        tokens = self.service.tokenizer.chat_tokens([Message("user", text)])
        options: dict[str, Any] = {"provenance": Provenance("asked", "serve")} if stored else {}
        request = Request(tokens, Sampling(), max_tokens=12, num_draft_tokens=3, min_tokens=12, **options)
        *_, last = [event async for event in self.service.worker.submit(Job(request, "a client"))]
        assert isinstance(last, Completion)
        return last

    async def worn(self) -> str | None:
        """What the draft wears, told by the models' thread once everything before is done."""
        return await self.service.worker.call(lambda engine: engine.adapter)
