"""kernels.streaming: galleries in parts have the bits of the whole; streams wait for each other; operators of torch."""

import contextlib
import random
import threading

import pytest
import torch
from test_rank import case
from test_topk import METRICS, features
from torch._subclasses.fake_tensor import FakeTensorMode

import kernels
from kernels import gallery as galleries
from kernels import streaming

Q, G, D = 7, 150, 20


def found(given, keys, metric, prepare=None, ops=kernels):
    """Everything that is asked of a gallery, with and without keys."""
    queries, gallery, query_group, gallery_group, offsets, listed = given
    named = {"query_keys": keys[0], "gallery_keys": keys[1]}
    rows = queries, kernels.prepare_gallery(gallery, low_precision=prepare) if prepare else gallery
    results = [
        *(ops.topk(*rows, k, metric=metric) for k in (0, 1, 40, G + 9)),
        ops.topk(*rows, 60, metric=metric, **named),
        ops.negatives_ahead(*rows, query_group, gallery_group, offsets, listed, metric=metric),
        ops.best_per_group(*rows, gallery_group, 7, metric=metric),
        ops.best_per_group(*rows, gallery_group, 7, metric=metric, **named),
    ]
    return [tensor for result in results for tensor in result]


def inputs(kind="normal", rows=G):
    given = case(Q, rows, D, kind=kind, most=12)
    generator = torch.Generator().manual_seed(1)
    keys = [torch.randint(0, 3, (n, 2), generator=generator) for n in (Q, rows)]
    keys[1][:, 0] = torch.where(
        torch.arange(rows) < rows // 3, keys[0][2, 0], keys[1][:, 0]
    )  # query 2: nothing in front
    return given, keys


def equal(one, other):
    return all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(("rows", "step"), [(30, 1), (G, 16), (G, 49), (G, 75), (G, 149)])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", ["normal", "whole", "equal", "wild"])
def test_parts_have_the_bits_of_the_whole(kind, metric, rows, step, monkeypatch):
    given, keys = inputs(kind, rows)
    expected = found(given, keys, metric)
    monkeypatch.setattr(streaming, "ROWS", step)
    for prepare in (None, "int8") if step > 1 else (None,):
        assert equal(found(given, keys, metric, prepare), expected)


def test_a_gallery_without_rows(monkeypatch):
    given, keys = inputs(rows=0)
    expected = found(given, keys, "l2")
    monkeypatch.setattr(streaming, "ROWS", 4)
    assert equal(found(given, keys, "l2"), expected)


def test_python_forms_in_parts(monkeypatch):
    given, keys = inputs(rows=30)
    expected = found(given, keys, "l2")
    monkeypatch.setattr(streaming, "ROWS", 7)
    for names in (vars(galleries), kernels.topk.__globals__, kernels.pair_scores.__globals__):
        monkeypatch.setitem(names, "backend", lambda _: None)
    assert equal(found(given, keys, "l2"), expected)


def test_blocks_of_queries_in_parts(monkeypatch):
    given, keys = inputs()
    expected = found(given, keys, "ip")
    monkeypatch.setattr(streaming, "ROWS", 40)
    monkeypatch.setitem(kernels.topk.__globals__, "QUERIES", 3)
    assert equal(found(given, keys, "ip"), expected)


def test_only_listed_rows_are_sent(monkeypatch):
    queries, gallery = features(3, 100, 8)
    seen, views = [], streaming._views

    def spy(columns, rows, count, step):
        seen.append((len(columns), rows.tolist(), count))
        return views(columns, rows, count, step)

    offsets, positives = torch.tensor([0, 2, 2, 4]), torch.tensor([90, 5, 7, 5])
    expected = kernels.pair_scores(queries, gallery, offsets, positives)
    monkeypatch.setattr(streaming, "ROWS", 2)
    monkeypatch.setattr(streaming, "_views", spy)
    keyed = kernels.prepare_gallery(gallery, keys=torch.arange(100), low_precision="int8")
    assert torch.equal(kernels.pair_scores(queries, keyed, offsets, positives), expected)
    assert seen == [(2, [5, 7, 90], 3)]


class Streams:
    """torch.cuda's streams and events, simulated: what is put on a stream runs late, in an order drawn at random among
    all that its stream's waits allow."""

    def __init__(self, seed):
        self.draw, self.lock = random.Random(seed), threading.RLock()
        self.streams, self.local = [], threading.local()
        self.main, self.before = self.Stream(), []
        self.main.put(lambda: self.before.append("what the memory was used for"))

    def Stream(self, device=None):
        self.streams.append(_Stream(self))
        return self.streams[-1]

    def Event(self):
        return _Event(self)

    def current_stream(self, device=None):
        return getattr(self.local, "stream", self.main)

    @contextlib.contextmanager
    def stream(self, stream):
        self.local.stream = stream
        yield
        del self.local.stream

    def mem_get_info(self, device):
        return 10**9, 10**9

    def memory_reserved(self, device):
        return 0

    memory_allocated = memory_reserved

    def advance(self, until=lambda: False):
        """Runs one step after another until nothing is left, or no longer than needed."""
        with self.lock:
            while not until():
                able = [stream for stream in self.streams if stream.queue and stream.queue[0][0]()]
                if not able:
                    assert not any(stream.queue for stream in self.streams), "streams wait for each other"
                    return
                self.draw.choice(able).queue.pop(0)[1]()


class _Stream:
    def __init__(self, cuda):
        self.cuda, self.queue = cuda, []

    def put(self, work, able=lambda: True):
        with self.cuda.lock:
            self.queue.append((able, work))

    def wait_event(self, event):
        mark = event.mark
        self.put(lambda: None, lambda: mark is None or mark.done)

    def wait_stream(self, other):
        event = _Event(self.cuda)
        event.record(other)
        self.wait_event(event)


class _Event:
    """The newest mark that `record` put on a stream; done when the stream has come that far."""

    class Mark:
        done = False

    def __init__(self, cuda):
        self.cuda, self.mark = cuda, None

    def record(self, stream):
        mark = self.mark = self.Mark()
        stream.put(lambda: setattr(mark, "done", True))

    def synchronize(self):
        if (mark := self.mark) is not None:
            self.cuda.advance(lambda: mark.done)


@pytest.fixture
def simulated(monkeypatch):
    def begin(seed):
        cuda = Streams(seed)
        monkeypatch.setattr(streaming, "cuda", cuda)

        def copy(target, source):
            assert cuda.before, "the buffer's memory is still used for something else"
            target.copy_(source)

        monkeypatch.setattr(streaming, "copy_over", lambda *both: cuda.current_stream().put(lambda: copy(*both)))
        return cuda

    return begin


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("seed", range(25))
def test_streams_wait_for_each_other(seed, listed, simulated):
    """What a search sees of every part, whichever stream is ahead."""
    cuda = simulated(seed)
    columns = [torch.arange(46.0).view(23, 2), torch.arange(23)]
    rows = torch.randperm(23, generator=torch.Generator().manual_seed(seed)) if listed else None
    seen = []
    for start, part in streaming._sent(columns, rows, 23, 4, torch.device("cpu")):
        assert len(part[0]) == min(4, 23 - start)
        for _ in range(seed % 4):
            cuda.main.put(lambda: None)  # searches take their time
        cuda.main.put(lambda part=part: seen.append([column.clone() for column in part]))
    cuda.advance()
    for i, column in enumerate(columns):
        assert torch.equal(torch.cat([part[i] for part in seen]), column if rows is None else column[rows])


@pytest.mark.parametrize("seed", range(10))
def test_given_up_half_way(seed, simulated):
    """Nothing is on its way any more when the buffers are given back."""
    cuda, left = simulated(seed), []
    arriving = streaming._sent([torch.arange(40)], None, 40, 4, torch.device("cpu"))
    next(arriving)
    arriving.close()
    cuda.main.put(lambda: left.append(len(cuda.streams[1].queue)))
    cuda.advance(lambda: bool(left))
    assert left == [0]


def test_a_failure_of_the_thread_is_told(simulated):
    simulated(0)
    broken = streaming._sent([torch.arange(4)], torch.tensor([1, 99]), 2, 1, torch.device("cpu"))
    next(broken)
    with pytest.raises(IndexError):
        next(broken)


@pytest.mark.parametrize("inference", [False, True])
def test_sent_in_any_mode(inference, simulated):
    cuda = simulated(0)
    with torch.inference_mode(inference):
        for _ in streaming._sent([torch.ones(9, 2)], None, 9, 4, torch.device("cpu")):
            cuda.advance()


def test_rows_of_a_part_follow_from_free_memory(monkeypatch, simulated):
    cuda = simulated(0)
    columns = [torch.empty(10**6, 96, dtype=torch.float16, device="meta"), torch.empty(10**6, device="meta")]
    row = 96 * 2 + 4 + streaming.BESIDE
    rows = lambda: streaming._rows_that_fit(columns, 10**6, torch.device("cpu"))  # noqa: E731
    assert rows() == min(streaming.BYTES, 10**9 // 4) // row
    cuda.memory_reserved = lambda device: 5000 * row
    cuda.memory_allocated = lambda device: 1000 * row
    cuda.mem_get_info = lambda device: (0, 10**9)
    assert rows() == 1000
    cuda.memory_reserved = cuda.memory_allocated
    assert rows() == 1


def test_a_gallery_on_another_device_is_refused():
    """Queries on a GPU may search a gallery in host memory; nothing else may differ."""
    for ours, theirs in (("meta", "cpu"), ("cpu", "meta")):
        with pytest.raises(ValueError, match="queries: expected the device of gallery"):
            kernels.topk(torch.zeros(2, 3, device=ours), torch.zeros(4, 3, device=theirs), 1)


@pytest.mark.xdist_group("dynamo")
def test_queries_on_a_gpu_search_a_gallery_in_host_memory():
    """As far as shapes and places go."""
    with FakeTensorMode():
        queries, gallery = torch.empty(3, 8, device="cuda"), torch.empty(50, 8)
        group, keys = torch.empty(50, dtype=torch.int64), torch.empty(50, 2, dtype=torch.int64)
        named = {"query_keys": torch.empty(3, 2, dtype=torch.int64, device="cuda"), "gallery_keys": keys}
        for values, rows in (
            kernels.topk(queries, gallery, 60, **named),
            kernels.best_per_group(queries, gallery, group, 60, **named),
        ):
            assert values.shape == rows.shape == (3, 60)
            assert values.device.type == rows.device.type == "cuda"
        with pytest.raises(ValueError, match=r"gallery_keys: expected the device of gallery \(cpu\)"):
            kernels.topk(queries, gallery, 3, query_keys=named["query_keys"], gallery_keys=keys.to("cuda"))
        with pytest.raises(ValueError, match=r"gallery_group: expected the device of gallery \(cpu\)"):
            kernels.best_per_group(queries, gallery, group.to("cuda"), 60)
        with pytest.raises(ValueError, match="queries: expected the device of gallery"):
            kernels.topk_reference(queries, gallery, 3)


def operators():
    queries, gallery, query_group, gallery_group, offsets, listed = case(5, 60, 12)
    keys = torch.arange(5)[:, None], torch.arange(60)[:, None] % 7
    scores = kernels.pair_scores(queries, gallery, offsets, listed)
    rows, groups = (queries, gallery), (query_group, gallery_group)
    return {
        "topk": (*rows, 70, "l2", *keys),
        "pair_scores": (*rows, offsets, listed, "cosine"),
        "count_ahead": (*rows, *groups, offsets, scores, listed, "cosine", 3),
        "negatives_ahead": (*rows, *groups, offsets, listed, "ip"),
        "best_per_group": (*rows, gallery_group, 7, "l2", *keys),
    }


@pytest.mark.xdist_group("dynamo")  # which takes long to load
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", operators())
def test_operator_registration(name, grad):
    queries, *rest = operators()[name]
    operator = getattr(torch.ops.kernels, name).default
    torch.library.opcheck(operator, (queries.requires_grad_(grad), *rest))
    results = operator(queries, *rest)
    assert not any(result.requires_grad for result in ([results] if isinstance(results, torch.Tensor) else results))


@pytest.mark.xdist_group("dynamo")
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic):
    given, keys = inputs()

    def run(queries, *rest):
        results = found((queries * 2, *rest), keys, "l2")
        scores = kernels.pair_scores(queries, rest[0], *rest[3:])
        ahead = kernels.count_ahead(queries, *rest[:4], scores, rest[4], index_base=2)
        return [*results, scores, ahead]

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    assert equal(compiled(*given), run(*given))
    given[0].requires_grad_()
    assert equal(compiled(*given), run(*given))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["normal", "equal", "wild"])
@pytest.mark.parametrize("metric", METRICS)
def test_a_gallery_in_host_memory_has_the_bits_of_one_on_the_gpu(metric, kind, monkeypatch):
    given, keys = case(64, 5000, 96, kind=kind, most=40), [torch.arange(n)[:, None] % 9 for n in (64, 5000)]
    on_gpu = [tensor.cuda() for tensor in given]
    expected = found(on_gpu, [key.cuda() for key in keys], metric)
    queries, _, query_group, _, offsets, listed = on_gpu
    for rows in (None, 700):
        monkeypatch.setattr(streaming, "ROWS", rows)
        for gallery in (given[1], given[1].pin_memory()):
            host = queries, gallery, query_group, given[3], offsets, listed
            for prepare in (None, "bfloat16"):
                assert equal(found(host, [keys[0].cuda(), keys[1]], metric, prepare), expected)
    torch.library.opcheck(torch.ops.kernels.topk.default, (queries, given[1], 5, metric, None, None))
