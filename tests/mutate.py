"""Do the tests notice? Plants one defect at a time in a copy of the tree and runs the tests that should fail.

    python tests/mutate.py                    all mutants
    python tests/mutate.py sampler "tie "     those whose file or description holds one of the words
    python tests/mutate.py --most 8           eight of them, spread evenly
    python tests/mutate.py --list
    TRITON_INTERPRET=1 python tests/mutate.py  those of the GPU's kernels, which the interpreter runs

Each line says killed (a test failed), SURVIVED (none did) or BROKEN (the tests could not run), and the seconds it took.
Exit code 1 unless every mutant is killed. First the tests have to pass as they are. A mutant runs in a fork of this
process, which has the libraries loaded already: importing torch and its like would take longer than the tests.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("engine", "kernels", "recipes", "tests", "pyproject.toml")
LIBRARIES = ("pytest", "hypothesis", "pyarrow", "scipy.io", "timm", "transformers.models.bert.modeling_bert")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CPU_SECONDS = 600 if INTERPRETED else 120  # a mutant that loops for ever is killed, and counts as noticed


class Mutant(NamedTuple):
    """file: below the root; old: text that occurs once in it; new: what replaces it; tests: what should fail then;
    interpreted: under TRITON_INTERPRET=1."""

    file: str
    breaks: str
    old: str
    new: str
    tests: tuple[str, ...]
    interpreted: bool = False

    def applied(self) -> str:
        """The mutated source; ValueError unless `old` occurs once."""
        source = (ROOT / self.file).read_text()
        if source.count(self.old) != 1:
            raise ValueError(f"{self.file}: {source.count(self.old)} times, not once: {self.old!r} ({self.breaks})")
        return source.replace(self.old, self.new)


def of(file: str, tests: str, *changes: tuple[str, str, str], interpreted: bool = False) -> list[Mutant]:
    """Mutants of one file: (what it breaks, old, new), killed by these tests (names without test_ and .py)."""
    files = tuple(f"tests/test_{name}.py" for name in tests.split())
    return [Mutant(file, breaks, old, new, files, interpreted) for breaks, old, new in changes]


MUTANTS = [
    *of(
        "engine/protocols.py",
        "protocols",
        ("market: other cameras are junk", "return index.camera[q] == index", "return index.camera[q] != index"),
        ("market: nothing is junk", "return index.camera[q] == index.camera[g]", "return nothing(index, q, g)"),
        ("real2, t2i: own camera is junk", "return np.zeros(np.shape(g), bool)", "return same_camera(index, q, g)"),
        ("ltcc:cc: same outfit counts", " | (index.clothes[q] == index.clothes[g])", ""),
        ("ltcc:cc: own camera counts", "same_camera(index, q, g) | (index.clothes[q] == ", "(index.clothes[q] == "),
        ("ltcc:sc: other outfits count", " | (index.clothes[q] != index.clothes[g])", ""),
        ("ltcc:sc: own camera counts", "same_camera(index, q, g) | (index.clothes[q] != ", "(index.clothes[q] != "),
        ("real2:pid_clothes: other outfits are positives", " + index.clothes[rows] + 1 for", " for"),
        ("real2:pid_clothes: nothing is junk", "by_clothes, same_camera", "by_clothes, nothing"),
        ("real2: own camera is junk", "as_distributed, nothing, _ALIKE", "as_distributed, same_camera, _ALIKE"),
        ("llcm: own camera number counts", "same_camera, _VIS2IR", "nothing, _VIS2IR"),
        ("prcc:multi queries A", "prcc(2, 0, False), nothing", "prcc(0, 0, False), nothing"),
        ("vc_clothes:cc: cameras 2, 3", "between_cameras(3, 4)", "between_cameras(2, 3)"),
        ("vc_clothes: all cameras", "rows[np.isin(index.camera[rows], cameras)]", "rows"),
        ("prcc: drawn by remainder", "word * len(rows) >> 64", "word % len(rows)"),
        ("prcc: every draw the same", "np.random.Philox(key=number)", "np.random.Philox(key=0)"),
        ("prcc:single queries B", "prcc(2, 0, True)", "prcc(1, 0, True)"),
        ("prcc:single_ac the wrong way round", "prcc(0, 2, True)", "prcc(2, 0, True)"),
        ("prcc:multi draws one image", "prcc(2, 0, False)", "prcc(2, 0, True)"),
        ("prcc, llcm: drawn in the order of the rows", "index.camera[rows[i]], paths[i])", "index.camera[rows[i]])"),
        (
            "prcc, llcm: cameras before identities",
            "(index.pid[rows[i]], index.camera[rows[i]], ",
            "(index.camera[rows[i]], index.pid[rows[i]], ",
        ),
        ("llcm: every draw the same", "random.Random(number)", "random.Random(0)"),
        ("llcm: the first image instead of a random one", "generator.choice(list(group))", "list(group)[0]"),
        (
            "llcm: one image per identity",
            "key=lambda row: (index.pid[row], index.camera[row])",
            "key=lambda row: index.pid[row]",
        ),
        ("llcm:vis2ir:2023-06 draws the gallery", 'llcm("nir", "vis", "nir")', 'llcm("nir", "vis", "vis")'),
        ("llcm:ir2vis draws the queries", 'llcm("nir", "vis", drawn="vis")', 'llcm("nir", "vis", drawn="nir")'),
        ("llcm: CMC counts images", "_VIS2IR, 10, True", "_VIS2IR, 10, False"),
        ("llcm: a single trial", "_SWAPPED, 10, True", "_SWAPPED, 1, True"),
        (
            "t2i: always the first caption",
            "[number for count in counts for number in range(count)]",
            "[0 for count in counts for _ in range(count)]",
        ),
        ("tie: own images in reverse", "np.lexsort((members.positions, -near", "np.lexsort((-members.positions, -near"),
        ("junk is counted as a positive", "hits = ~members.junk[order]", "hits = members.junk[order] >= 0"),
        ("AP: hits counted from 0", "- np.repeat(starts, count) + 1", "- np.repeat(starts, count)"),
        ("AP: divided by one more", "/ np.maximum(reached, 1)", "/ (reached + 1)"),
        ("mINP: by the first positive", "count / ranks[starts + count - 1]", "count / ranks[starts]"),
        ("CMC: strictly before the rank", "first[:, None] <= np.arange", "first[:, None] < np.arange"),
        (
            "CMC: ends with a short gallery",
            "np.arange(1, RANKS + 1), axis=0",
            "np.arange(1, min(RANKS, gallery) + 1), axis=0",
        ),
        ("llcm: CMC counts the own identity", "1 + (ahead & (groups", "1 + (ahead | (groups"),
        (
            "llcm: CMC forgets equal scores",
            " | ((scores == score[:, None]) & (rows < position[:, None]))",
            "",
        ),
        (
            "llcm: CMC by the last positive",
            "[offsets[:-1][np.diff(offsets) > 0]]",
            "[offsets[1:][np.diff(offsets) > 0] - 1]",
        ),
        (
            "truncation after junk is removed",
            "(counts[order] + place)[hits] < truncate",
            "counts[order][hits] < truncate",
        ),
        ("truncation: CMC counts identities", "protocol.deduplicate and truncate is None", "protocol.deduplicate"),
        (
            "truncation one rank late",
            "(counts[order] + place)[hits] < truncate",
            "(counts[order] + place)[hits] <= truncate",
        ),
        ("truncation: nothing found is a hit", "np.where(reached > 0, ranks[starts], RANKS + 1)", "ranks[starts]"),
        ("truncation: AP by all positives", "np.maximum(reached, 1)", "count"),
        ("truncation of a list after junk is removed", "ranks[places[hits] < truncate]", "ranks[ranks <= truncate]"),
        ("queries without a positive count", "offsets[:-1][count > 0], count[count > 0]", "offsets[:-1], count"),
        ("counts: not sorted", "ahead[np.lexsort((ahead, query))]", "ahead"),
        ("rankings: junk is kept", "np.flatnonzero(~junk[query, ranking])", "np.arange(len(ranking))"),
        ("re-scoring: worst first", "np.argsort(-matching", "np.argsort(matching"),
        ("re-scoring: positives push positives", "!= trial.group_query[:, None], axis=1)", "!= -1, axis=1)"),
        ("re-scoring: not at all", "ahead[start + inside] = misses", "ahead[start + inside] += 0 * misses"),
        (
            "spread of a sample",
            "np.std([trial.mAP for trial in trials])",
            "np.std([trial.mAP for trial in trials], ddof=1)",
        ),
        ("chance: one positive too many", "(R - 1) / max(n - 1, 1)", "R / max(n - 1, 1)"),
    ),
    *of(
        "kernels/bounds.py",
        "topk rank narrow candidates",
        ("float32: no room for the sum's order", "D * U / (1 - D * U) + 16 * U", "16 * U / D"),
        ("l2: bound of the products alone", "2 * one, -m * m, 2 * C * m, C * m * m", "2 * one, -m * m, zero, zero"),
        ("int8: the gallery's rounding", "zero, one, _over(rest, m)", "zero, one, zero"),
        (
            "int8: the query's rounding",
            "_over(s, n), _over(residual, n), _over(y, n)",
            "_over(s, n), zero, _over(y, n)",
        ),
        ("bounds where numbers underflow", "(norm < LOWEST) | ", ""),
        ("bounds where numbers overflow", " | (norm > HIGHEST)", ""),
        ("int16: rounding", "residual = 0.505 * ", "residual = 0.45 * "),
        (
            "leading: what is left",
            "(squares - (leading * leading).sum(1)).clamp(min=0)",
            "0.7 * (squares - (leading**2).sum(1)).clamp(min=0)",
        ),
        ("float16: rounding", "0.501 * 2.0**-10", "0.45 * 2.0**-10"),
        ("float16: a scale that is no power of two", "_over(kept, mantissa) * 2.0**-15", "kept * 2.0**-15"),
        ("float16: beyond its range", "* 2.0**-15", "* 2.0**-17"),
        ("narrow: codes of what is wild", "_unless_wild(norms, norms).isfinite()", "norms.isfinite()"),
    ),
    *of(
        "kernels/narrow.py",
        "narrow topk",
        ("few queries, too", "else LEAST)", "else LEAST - 1)"),
        ("wrong products count", "return False  # a processor", "pass  # a processor"),
        ("what is slower is used", "took) < min(", "took) > min("),
        ("measured by all threads", ", initializer=one)", ")"),
    ),
    *of(
        "kernels/leading.py",
        "candidates topk",
        ("the least directions come first", ".eigenvectors.flip(1)", ".eigenvectors"),
        ("directions too long", "directions * SHRUNK if", "directions if"),
        ("not orthonormal", "float(beside.norm()) <= 1e-10", "True"),
        ("one pass", "PASSES = 3", "PASSES = 0"),
    ),
    *of(
        "kernels/candidates.py",
        "candidates topk",
        ("squared distances, too", 'metric == "l2" or ', ""),
        ("codes are not looked for", "gallery.codes is not None or ", ""),
        ("any number of features", "D < MOST_FEATURES", "D <= MOST_FEATURES"),
        ("however near the scores are", "if takes > 1:", "if takes > 99:"),
        ("small galleries, too", "len(gallery) < 4 * SAMPLE[1]", "len(gallery) < SAMPLE[1]"),
        ("a crowd of the best alone", "-(-k * len(self.m) // len(self.gallery))", "1"),
        ("looked for again each time", "gallery.due = AGAIN * gallery.searched", "pass"),
        ("projected at once", "if gallery.searched < price:", "if gallery.searched < 0:"),
        ("whatever is gained", "if least > GAIN * now or", "if"),
        ("whatever queries ask", "trial.takes(k, dtype, trial.of(known)) > GAIN * takes", "False"),
        (
            "what queries leave out",
            "theirs = Short(scales(gallery.norms, dtype), left_theirs, error)",
            "theirs = Short(scales(gallery.norms, dtype), 0.5 * left_theirs, error)",
        ),
        ("bounds of other directions", "ours.left, along.left, along.bounds", "ours.left, along.left, gallery.made"),
        ("bounds of another metric", "kept[metric, dtype] = ", 'kept["cosine", dtype] = kept["ip", dtype] = '),
        ("two threads look", "if look and _due(gallery):", "if look:"),
        ("one query counts as one", "counted = max(Q, FEW)", "counted = Q"),
    ),
    *of(
        "kernels/gallery.py",
        "topk rank",
        ("broken rows are not looked for", "if len(broken):", "if len(broken) > 2:"),
        (
            "reference: another order",
            "one, other = lanes.chunk(2, -1)",
            "one, other = lanes[..., ::2], lanes[..., 1::2]",
        ),
        ("a strip too few", "range(start, min(start + rows, Q))", "range(start, min(start + rows, Q - 1))"),
        (
            "the last columns are left out",
            "for start in range(*columns, width):",
            "for start in range(columns[0], columns[1] - 1, width):",
        ),
        ("threads are not put back", "torch.set_num_threads(_threads)", "pass"),
        ("each thread's product takes all", ", functools.partial(torch.set_num_threads, 1))", ")"),
        (
            "float32 is multiplied in fewer bits",
            '(_MATMUL[0], "fp32_precision", "ieee")',
            '(_MATMUL[0], "fp32_precision", "tf32")',
        ),
        ("float16 is summed in float16", '"allow_fp16_accumulation", False', '"allow_fp16_accumulation", True'),
        ("precision is not put back", "in zip(STRICT, _before, strict=True)", "in ()"),
        ("one key counts", "(len(rows), None), f", "(len(rows), 1), f"),
    ),
    *of(
        "kernels/topk.py",
        "topk narrow candidates",
        ("keys are forgotten", "exclusion_of(queries, keys)", "exclusion_of(queries, None)"),
        ("k of the gallery, not of the call", "min(k, len(part))", "len(part)"),
        (
            "blocks of queries begin anew",
            "values[block, : found.shape[1]], indices[block, : rows.shape[1]] = found, rows",
            "values[: len(rows), : rows.shape[1]], indices[: len(rows), : rows.shape[1]] = found, rows",
        ),
        (
            "l2 comes negative",
            'return 0 - values if metric == "l2" else values, indices\n\n\ndef _search',
            "return values, indices\n\n\ndef _search",
        ),
        ("a part is searched twice", "lists[part], Q", "lists[0], Q"),
        ("a strip's queries are not asked for", "strip_rows(Q, threads, parts, device)", "Q"),
        ("autocast's types", ", torch.autocast(device.type, enabled=False):", ":"),
        ("missing rows have a number", "torch.full((Q, k), -1, dtype", "torch.full((Q, k), 0, dtype"),
    ),
    *of(
        "kernels/rank.py",
        "rank",
        ("listed rows in the order they came", "order = order[column[order].argsort(stable=True)]", "order = order"),
        ("equal thresholds in the wrong order", "numbers.argsort(descending=True", "numbers.argsort(descending=False"),
        ("counts in another order", "scatter_(0, order, total)", "copy_(total)"),
        ("one part's counts", "counts.sum(0)", "counts[0]"),
        (
            "l2: thresholds as they are",
            'thresholds = 0 - thresholds if metric == "l2" else thresholds',
            "thresholds = +thresholds",
        ),
        ("numbers begin at 0", "*addresses, index_base)", "*addresses, 0)"),
        ("groups: bounds of other rows", "tuple(part[order] for part in given.gallery_bounds)", "given.gallery_bounds"),
        ("groups: keys of other rows", "(keys[0], keys[1][order])", "keys"),
        ("groups: rows as they stand", "            order=order,\n", ""),
    ),
    *of(
        "kernels/topk.py",
        "streaming",
        ("parts: numbers of the part", "rows, rows + base)", "rows, rows)"),
        ("parts: keys of the first part", "beside[0])", "gallery_keys)"),
        ("parts: a later one replaces what was found", "            if base:\n", "            if False:\n"),
        ("operator: another shape", "shape = len(queries), k", "shape = k, len(queries)"),
        ("operator: gradients are expected", "torch.library.fallthrough_kernel", "_topk"),
    ),
    *of(
        "kernels/rank.py",
        "streaming",
        ("parts: counts begin at 0", "metric, index_base + base)", "metric, index_base)"),
        ("parts: positives of the whole", "place[own] - base", "place[own]"),
        ("parts: every positive in every part", "(place >= base) & ", ""),
        ("parts: the later of equal rows", "(scores > best[0])", "(scores >= best[0])"),
        ("parts: missing is as good as -inf", "((best[1] < 0) | (scores", "((best[1] < -1) | (scores"),
        ("parts: groups' rows of the part", "rows + base, best[1]", "rows, best[1]"),
    ),
    *of(
        "kernels/streaming.py",
        "streaming",
        ("a pinned buffer is filled too early", "copied[slot].synchronize()", "pass"),
        ("a part is overwritten while it is searched", "side.wait_event(searched[slot])", "pass"),
        ("a part is searched before it is there", "ours.wait_event(copied[i % 2])", "pass"),
        ("nobody says that a part was searched", "searched[i % 2].record(ours)", "pass"),
        ("memory that is still in use", "event.record(ours)  # what", "pass  # what"),
        ("given up with rows on their way", "ours.wait_stream(side)", "pass"),
        ("one buffer", "starts[i + 1], (i + 1) % 2)", "starts[i + 1], 0)"),
        ("the mode of the caller", "torch.inference_mode(), cuda", "torch.no_grad(), cuda"),
        (
            "listed rows as they stand",
            "torch.index_select(column, 0, rows[start:stop], out=source)",
            "source.copy_(column[start:stop])",
        ),
        ("buffers for all memory there is", "free // (4 * row)", "free // row"),
        ("one row too few", "slice(start, start + step)", "slice(start, start + step - 1)"),
        ("missing rows first", "order = (rows < 0)", "order = (rows >= 0)"),
        ("rows that nobody asked for", "column[part] if rows is None else column[rows[part]]", "column[part]"),
    ),
    *of(
        "kernels/sharded.py",
        "sharded",
        (
            "rows of the part, not of the whole",
            "return sum(_sizes(len(gallery), device, group)[: dist.get_rank(group)])",
            "return 0",
        ),
        ("counts of this rank's part alone", "dist.all_reduce(ahead, group=group)", "pass"),
        ("other ranks' answers", "start = sum(sizes[: dist.get_rank(group)])", "start = 0"),
        ("l2: the farthest", 'k, descending=metric != "l2"', "k, descending=True"),
    ),
    *of(
        "engine/rerank.py",
        "rerank",
        ("neighbours that are not mutual", "own.multiply(own.T).tocsr(), half", "own, half"),
        ("no expansion", "result = (own + common @ half).tocsr()", "result = own.tocsr()"),
        ("expansion from half of a set", "> 2 / 3 * np", "> 1 / 2 * np"),
        ("distances as they are", ") / np.repeat(farthest, np.diff(wanted.indptr))", ")"),
        ("no query expansion", "if k2 > 1:", "if k2 > 100:"),
        ("Jaccard of the sum", "common / (2 - common)", "common / 2"),
    ),
    *of(
        "kernels/triplet.py",
        "triplet",
        ("reference: hinge sign", "F.relu(u[:, :, None] - u[:, None, :])", "F.relu(u[:, None, :] - u[:, :, None])"),
        ("reference: margin sign", "u = d + margin * beta\n    counted", "u = d - margin * beta\n    counted"),
        ("reference: no hinge", "F.relu(u[:, :, None] - u[:, None, :])", "(u[:, :, None] - u[:, None, :])"),
        ("reference: the anchor refers to itself", "> tie) & other[:, :, None] & other", "> tie) & other"),
        (
            "reference: tie band on the wrong side",
            "beta[:, None, :] > tie) & other",
            "beta[:, None, :] > -tie) & other",
        ),
        ("reference: mean over all, counted or not", "terms_aij.sum() / count.clamp(min=1)", "terms_aij.mean()"),
        ("reference: identity mask", ".masked_fill(~same, 0)", ""),
        ("reference: clamp", "        beta = beta.clamp(min=0)", "        beta = beta"),
        (
            "reference: cosine of vectors that are not unit",
            "t = F.normalize(instructions.detach(), dim=-1)",
            "t = instructions.detach()",
        ),
        ("reference: distance without its cross term", "- 2 * features @ features.mT", "- features @ features.mT"),
        ("reference: distances exchanged", '"euclidean")) == "euclidean":', '"euclidean")) != "euclidean":'),
        ("reference: hard: no sign", "F.relu(torch.sign(b1 - b2) * (d1", "F.relu((d1"),
        ("reference: hard: a pair of one", "counted = second & ((b1", "counted = ((b1"),
        ("reference: hard: equal sentences told apart", "((b1 - b2).abs() > tie)", "(b1 != b2)"),
        ("groups: its own place among the others", "slots + (slots >= place[:, None])", "slots"),
        ("groups: absent ones are others", "torch.where(present, index, places[:, None])", "index"),
        ("groups: the way back", "(place[:, None] > member).long()", "(place[:, None] >= slots).long()"),
        (
            "blocks: the last is left out",
            "range(rows.start, rows.stop, step)",
            "range(rows.start, rows.stop - step, step)",
        ),
        ("cosine of vectors that are not unit", "beta /= (lengths[:, None]", "beta /= 1 + 0 * (lengths[:, None]"),
        ("clamp", "return beta if raw else beta.clamp_(min=0)", "return beta"),
        ("raw is clamped", "return beta if raw else", "return beta.clamp_(min=0) if raw else"),
        (
            "sets: gathered from the first",
            "index + N * torch.arange(S, device=x.device)[",
            "index + 0 * torch.arange(S)[",
        ),
        (
            "pairs: squared and plain distance exchanged",
            "return d if squared else d.sqrt_()\n\n\ndef _add",
            "return d\n\n\ndef _add",
        ),
        (
            "hinge of two of the identity",
            "(u[:, :, :, None] - u[:, :, None, js])",
            "(u[:, :, None, js] - u[:, :, :, None])",
        ),
        ("tie band of two of the identity", "beta[:, None, js] > tie)", "beta[:, None, js] > 0)"),
        ("absent ones count", "> tie) & groups.present[:, :, None] &", "> tie) &"),
        ("counted: the identity itself", "* (N - groups.size)", "* (N - 1)"),
        ("gradient of the farther of two", "weight[:, :, js] -= positive.sum(2)", "pass"),
        ("margin sign", "u = d + margin * beta\n    loss", "u = d - margin * beta\n    loss"),
        ("tie band ignored", "u.masked_fill(~(s * beta > tie)", "u.masked_fill(~(s * beta > 0)"),
        ("raw: those behind are forgotten", "in (1, -1)[: 1 + raw]])", "in (1, -1)[:1]])"),
        ("rows: no pull of others that share an identity", "wanted[groups.others[rows].flatten()] = True", "pass"),
        (
            "gradient: the way back is forgotten",
            "both = weight[:, rows] + weight[",
            "both = weight[:, rows] + 0 * weight[",
        ),
        ("gradient of the root", "both if squared else both * _halves(d[:, rows])", "both"),
        ("gradient at distance 0", "return torch.where(d > 0, 0.5 / d, 0)", "return 0.5 / d"),
        ("gradient: half of it", "result *= -2", "result *= -1"),
        ("gradient of the anchor itself", "-found.pull[:, :, None])", "0 * found.pull[:, :, None])"),
        ("gradient: scale of each set", "gradient * dloss[:, None, None]", "gradient * dloss.sum()"),
        ("rows: gradient elsewhere", "found.gradient[:, : rows.start] = found.gradient[:, rows.stop :] = 0", "pass"),
        ("active: divided by all that count", "(found.active if whole else found.counted)", "found.counted"),
        ("mean: divided by the active", "(found.active if whole else found.counted)", "found.active"),
        (
            "rows: normalised by themselves",
            "found.counted).sum(1)\n        count",
            "found.counted)[:, rows].sum(1)\n        count",
        ),
        (
            "a gradient of the gradient, silently",
            "_Scaled.apply(gradient, dloss, features)",
            "gradient * dloss[:, None, None]",
        ),
        (
            "default distances exchanged",
            '    distance = distance or ("squared" if mining == "all" else "euclidean")',
            '    distance = distance or ("euclidean" if mining == "all" else "squared")',
        ),
        (
            "hard: nearest of the same identity",
            ".expand(S, -1, -1), torch.inf)\n        nearest",
            ".expand(S, -1, -1), 0)\n        nearest",
        ),
        ("hard: the farthest twice", "far.scatter_(2, places[:, :, number, None], -torch.inf)", "pass"),
        (
            "hard: absent ones are far",
            "to_same.masked_fill(~groups.present, -torch.inf)",
            "to_same + 9 * ~groups.present",
        ),
        (
            "hard: margin sign of the pair",
            "(sign * (d1 - d2 + margin * (b1 - b2))).clamp",
            "(sign * (d1 - d2 - margin * (b1 - b2))).clamp",
        ),
        ("hard: no sign", "pair = (sign * (d1", "pair = ((d1"),
        ("hard: equal sentences told apart", ".masked_fill_((b1 - b2).abs() <= tie, 0)", ""),
        ("hard: margin sign of the push", "push = (d1 + margin", "push = (d1 - margin"),
        ("hard: weight of the pair", "_Result(0.1 * pair + push", "_Result(pair + push"),
        ("hard: gradient of the pair", "0.1 * sign * (pair > 0)", "sign * (pair > 0)"),
        ("hard: pushed from nobody", ".clamp(min=0).masked_fill(~some, 0)", ".clamp(min=0)"),
        ("hard: nobody is pulled back", "_add_rows(result, edges[:, rows], back)", "pass"),
        (
            "hard: mean over anchors that cost something",
            'if reduction == "mean" else terms\n',
            'if reduction != "mean" else terms\n',
        ),
        ("cpu: the same identity is another", "d.scatter_(2, same, sign * torch.inf)", "pass"),
        ("cpu: skipped alive", "max() <= (sign * d).min()", "max() <= (sign * d).max()"),
        (
            "cpu: hinge sign",
            "(own - d[:, None] if sign > 0 else d[:, None] - own)",
            "(d[:, None] - own if sign > 0 else own - d[:, None])",
        ),
        ("cpu: weight without its sign", "weight[:, :, ks] += sign * number.mT", "weight[:, :, ks] += number.mT"),
        (
            "cpu: the others' anchors are forgotten",
            "(torch.gt if sign > 0 else torch.lt)(theirs, d[:, None], out=term)",
            "term.zero_()",
        ),
        ("cpu: their side of those behind", "(torch.gt if sign > 0 else torch.lt)", "torch.gt"),
        ("cpu: root", "sums.mul_(torch.where(d.isfinite() & (d > 0), 0.5 / d, 0))", "pass"),
        (
            "negative rounding of a distance",
            ".add_(squares[:, anchors, None]).clamp_(min=0)",
            ".add_(squares[:, anchors, None])",
        ),
        (
            "autocast computes in few bits",
            "torch.autocast(features.device.type, enabled=False)",
            "torch.autocast(features.device.type, enabled=True)",
        ),
    ),
    *of(
        "kernels/triplet.py",
        "triplet",
        ("kernel: distance without its cross term", "- 2 * dots\n", "- dots\n"),
        ("kernel: negative rounding", "d = tl.where(d < 0, 0.0, d)", "d = d"),
        ("kernel: root", "        d = tl.sqrt(d)", "        d = d"),
        ("kernel: the same identity is another", "& (others[None, :] != label[:, None])", "& (others[None, :] >= 0)"),
        ("kernel: columns beyond the last", "return d, within[None, :] & ok", "return d, ok"),
        ("kernel: skipped alive", "if tl.min(dead.to(tl.int32)) == 0:", "if tl.max(dead.to(tl.int32)) == 0:"),
        ("kernel: skipped alive, those behind", "else u[:, None] >= most", "else u[:, None] >= least"),
        ("kernel: hinge sign", "term = (u[:, None] - d) * sign", "term = (d - u[:, None]) * sign"),
        ("kernel: no hinge", "other & ~(term <= 0), term", "other, term"),
        ("kernel: weight without its sign", "weight += sign * number", "weight += number"),
        ("kernel: not counted", "                    active += number", "                    active += 0"),
        ("kernel: own anchors' derivative", "sums -= sign * ((u[:, None] - d) * sign > 0).to(dtype)", "sums -= 0"),
        ("kernel: the others' derivative", "sums -= sign * ((theirs[None, :] - d) * sign > 0).to(dtype)", "sums -= 0"),
        ("kernel: derivative of the root", "sums * 0.5 / d", "sums * 0.5"),
        ("kernel: root at 0", "sums = tl.where(d > 0, sums * 0.5 / d, 0.0)", "sums = sums * 0.5 / d"),
        ("kernel: derivative within the identity", "sums = tl.where(other, sums, 0.0)", "sums = sums"),
        ("kernel: pull", "pull += tl.sum(sums, 1)", "pull += 0"),
        (
            "kernel: set",
            "squares_at, at = SQUARES + s * N, s * R + rows",
            "squares_at, at = SQUARES + 0 * s, s * R + rows",
        ),
        (
            "kernel: thresholds of the first set",
            "tl.load(UP + ((side * S + s) * K + k) * N + anchors)",
            "tl.load(UP + ((side * S) * K + k) * N + anchors)",
        ),
        ("kernel: rows are anchors", "anchors = tl.load(ANCHORS + rows, mask=ok, other=0)", "anchors = rows"),
        interpreted=True,
    ),
    *of(
        "kernels/triplet.py",
        "losses",
        ("gradient to the instructions", "normalize(instructions.detach()", "normalize(instructions"),
    ),
    *of(
        "kernels/attention.py",
        "attention",
        ("reference: gate ignored", "(gate.float().view(1, -1, 1, 1) * (maps @ v_ins))", "(maps @ v_ins)"),
        ("reference: image scale", "torch.softmax(q @ k.mT * scale, -1)", "torch.softmax(q @ k.mT, -1)"),
        ("reference: instruction scale", "q @ k_ins.mT * scale", "q @ k_ins.mT"),
        (
            "reference: one token too many",
            "< ins_lengths[:, None]\n        # 0 * NaN",
            "<= ins_lengths[:, None]\n        # 0 * NaN",
        ),
        (
            "reference: padding attended to",
            "scores_BHNM.masked_fill(~valid_BM[:, None, None], torch.finfo(q.dtype).min)",
            "scores_BHNM",
        ),
        ("reference: NaN of the padding", "(t.masked_fill(~valid_BM[:, None, :, None], 0.0) for t", "(t for t"),
        (
            "no second derivative, silently",
            'torch.library.register_autograd("kernels::gated_attention_backward", _refuse, lib=_LIBRARY)',
            "",
        ),
        (
            "cpu: gate ignored",
            "(first, x.gate.view(-1, 1, 1), second, out=",
            "(first, x.gate.view(-1, 1, 1) ** 0, second, out=",
        ),
        ("cpu: gate of the gradient ignored", "gated = (dout * x.gate.view(-1, 1, 1)).to", "gated = dout.to"),
        (
            "cpu: gradient of q without the second term",
            "dq_first[at], dq_second, out",
            "dq_first[at], dq_first[at] * 0, out",
        ),
        ("cpu: gate gradient of the whole", "c.to(sums)).sum", "a.to(sums)).sum"),
        ("cpu: gate gradient of one head", "dgate_H.sum().view(1)", "dgate_H[:1]"),
        ("cpu: scale of the first term", "attend(x.q, x.k, x.v, scale=scale)", "attend(x.q, x.k, x.v)"),
        ("cpu: scale of the second term", "attn_mask=runs[0].bias, scale=scale)", "attn_mask=runs[0].bias)"),
        ("cpu: scale of a call of its own", "run), scale=scale)", "run))"),
        ("cpu: scale of the first gradients", "a, b, 0.0, False, scale=scale)", "a, b, 0.0, False)"),
        ("cpu: scale of the second gradients", "attn_mask=run.bias, scale=scale", "attn_mask=run.bias"),
        ("cpu: padding attended to", 'masked_fill_(padding_BM, float("-inf"))', "masked_fill_(padding_BM, 0.0)"),
        ("cpu: padding attended to in the backward", "0.0, False, attn_mask=run.bias,", "0.0, False,"),
        ("cpu: one token too many", ">= lengths[:, None]", "> lengths[:, None]"),
        ("cpu: NaN of the padding's keys", "if not (_harmless(x.k_ins) and _harmless(x.v_ins))", "if False"),
        ("cpu: large numbers in padding", "high.item() < 1e18", "high.item() == high.item()"),
        ("cpu: minus infinity in padding", "return low.item() > -1e18 and", "return"),
        ("cpu: lengths in another order", "ends = [*starts[1:], B]", "ends = [*starts[1:], starts[-1]]"),
        ("cpu: a longer call", ": run.tokens], x.v_ins", ":], x.v_ins"),
        ("cpu: gradient of padding left as it was", "grad[at, :, n:] = 0", "pass"),
        ("cpu: no instruction, no gradient of q", "            dq[at] = dq_first[at]", "            pass"),
        ("cpu: no instruction, any second term", "lse_ins[run.samples] = 0, 0", "lse_ins[run.samples] = 1, 0"),
        ("cpu: any stride over features", "t if t is None or t.stride(-1) == 1 else t.contiguous()", "t"),
        (
            "more keys than rows",
            "_check.shape(name, tensor, (B, H, N, D)",
            "_check.shape(name, tensor, (B, H, None, D)",
        ),
        ("cpu: lengths are not looked at", "if min(counts) < 0 or max(counts) > M:", "if False:"),
        ("autocast ignored", 'if device not in ("cpu", "cuda") or', "if True or"),
        (
            "scale dropped",
            "scale = q.shape[-1] ** -0.5 if scale is None else scale\n    if not",
            "scale = q.shape[-1] ** -0.5\n    if not",
        ),
        (
            "packed: keys and values exchanged",
            "k_ins, v_ins = k_ins.permute",
            "v_ins, k_ins = k_ins.permute",
        ),
        (
            "packed: lengths dropped",
            "return _call(qkv, None, None, kv_ins, None, gate, ins_lengths, scale, tokens)",
            "return _call(qkv, None, None, kv_ins, None, gate, None, scale, tokens)",
        ),
        ("fake: another shape of what is kept", "[((B, N, H, D), x.q.dtype)", "[((B, H, N, D), x.q.dtype)"),
    ),
    *of(
        "kernels/attention.py",
        "attention",
        ("gate ignored", "out += gate * second", "out += second"),
        ("gate sign", "out += gate * second", "out -= gate * second"),
        (
            "scale of the scores",
            "tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale2\n        s =",
            "tl.dot(q, tl.trans(k), input_precision=PRECISION)\n        s =",
        ),
        ("keys beyond the last", 's = tl.where((keys < count)[None, :], s, float("-inf"))', ""),
        ("one key too many", "s = tl.where((keys < count)[None, :], s", "s = tl.where((keys <= count)[None, :], s"),
        (
            "one row too many is read",
            "mask = (rows < count)[:, None] & (cols < D)[None, :]\n    return",
            "mask = (rows <= count)[:, None] & (cols < D)[None, :]\n    return",
        ),
        (
            "padding features are read",
            "(rows < count)[:, None] & (cols < D)[None, :]\n    return",
            "(rows < count)[:, None] & (cols < BLOCK_D)[None, :]\n    return",
        ),
        (
            "padding features are written",
            "(rows < count)[:, None] & (cols < D)[None, :]\n    at",
            "(rows < count)[:, None] & (cols < BLOCK_D)[None, :]\n    at",
        ),
        ("no running maximum", "higher = tl.maximum(top, tl.max(s, 1))", "higher = tl.maximum(top, 0.0)"),
        ("maximum of the tile alone", "higher = tl.maximum(top, tl.max(s, 1))", "higher = tl.max(s, 1)"),
        ("sum not rescaled", "total = total * shrink + tl.sum(p, 1)", "total = total + tl.sum(p, 1)"),
        ("values not rescaled", "acc * shrink[:, None], input_precision", "acc, input_precision"),
        ("not divided by the sum", "return acc / total[:, None], tl.where", "return acc, tl.where"),
        ("logarithm without the maximum", "top + tl.log2(total), 0.0)", "tl.log2(total), 0.0)"),
        (
            "keys after the full tiles",
            "stride, count, full, count, top, total, acc, scale2, D, BLOCK_D, 16, PRECISION)",
            "stride, count, full, full, top, total, acc, scale2, D, BLOCK_D, 16, PRECISION)",
        ),
        (
            "length ignored",
            "        second, lse = _attention_of(q, ki_at, vi_at, ins_m, length,",
            "        second, lse = _attention_of(q, ki_at, vi_at, ins_m, 16,",
        ),
        (
            "backward: score scale",
            "input_precision=PRECISION) * scale2 - lse[:, None])",
            "input_precision=PRECISION) - lse[:, None])",
        ),
        (
            "backward: keys beyond the last",
            "return tl.where((keys < count)[None, :], p, 0.0), tl.dot",
            "return p, tl.dot",
        ),
        ("backward: delta ignored in dq", "(p * (dp - delta[:, None])).to(k.dtype)", "(p * dp).to(k.dtype)"),
        ("backward: delta sign in dq", "(p * (dp - delta[:, None]))", "(p * (dp + delta[:, None]))"),
        ("backward: both terms in delta", "delta -= gate * second", "delta -= 0.0 * second"),
        ("backward: gate of dq", "dq *= gate", "dq *= 1.0"),
        ("backward: scale of dq", "dq * scale, D, BLOCK_D)", "dq, D, BLOCK_D)"),
        (
            "backward: delta of the instruction not stored",
            "tl.store(delta_ins_at + rows, second, mask=rows < N)",
            "tl.store(delta_ins_at + rows, 0.0 * second, mask=rows < N)",
        ),
        (
            "backward: delta of the image not stored",
            "tl.store(delta_at + rows, delta, mask=rows < N)",
            "tl.store(delta_at + rows, 0.0 * delta, mask=rows < N)",
        ),
        ("backward: gate gradient of a tile alone", "dgate = tl.sum(second)", "dgate = tl.max(second)"),
        ("backward: score scale of keys", "* scale2 - lse[None, :])", "- lse[None, :])"),
        ("backward: delta ignored in dk", " - delta[None, :])", ")"),
        ("backward: dk from values", "ds.to(q.dtype), q, dk", "ds.to(q.dtype), do, dk"),
        ("backward: dv from queries", "p.to(do.dtype), do, dv", "p.to(do.dtype), q, dv"),
        ("backward: scale of dk", "dk * (factor * scale), 0.0)", "dk * factor, 0.0)"),
        ("backward: gate of dk", "dk * (factor * scale), 0.0)", "dk * scale, 0.0)"),
        ("backward: gate of dv", "dv * factor, 0.0)", "dv, 0.0)"),
        (
            "backward: padding gets a gradient of values",
            "tl.where(valid, dv * factor, 0.0)",
            "dv * factor + 1.0 * (count == 0)",
        ),
        ("backward: rows after the full tiles", "N, full, end, dk, dv, scale2", "N, full, full, dk, dv, scale2"),
        (
            "backward: padding is not written",
            "for start in tl.range(full, M, 16, disable_licm=True):",
            "for start in tl.range(full, length, 16, disable_licm=True):",
        ),
        (
            "backward: heads of the gate gradient",
            "tl.store(DGATE + b * H + h, dgate)",
            "tl.store(DGATE + b * H + 0, dgate)",
        ),
        (
            "backward: gate gradient summed over heads",
            "dgate_BH.sum(0) if len(x.gate) > 1",
            "dgate_BH.sum(0) if len(x.gate) > 9",
        ),
        ("a head's gate", "0 if x.gate is None or len(x.gate) == 1 else x.gate.stride(0)", "0"),
        ("strides of keys for values", "if len(strides) == 1 and unit == 1", "if unit == 1"),
        ("any stride over features", "if len(strides) == 1 and unit == 1 and", "if len(strides) == 1 and"),
        (
            "backward: offsets of 32 bits",
            "(tl.program_id(0) // H).to(tl.int64), (tl.program_id(0) % H).to(tl.int64)\n    q_at, out_at, do_at",
            "(tl.program_id(0) // H), (tl.program_id(0) % H)\n    q_at, out_at, do_at",
        ),
        (
            "offsets of 32 bits",
            "(tl.program_id(0) // H).to(tl.int64), (tl.program_id(0) % H).to(tl.int64)\n    q_at, out_at = Q",
            "(tl.program_id(0) // H), (tl.program_id(0) % H)\n    q_at, out_at = Q",
        ),
        interpreted=True,
    ),
    *of(
        "engine/model/fusion.py",
        "model",
        ("the last word is masked", "> lengths[:, None]", ">= lengths[:, None]"),
        ("the first padding is seen", "> lengths[:, None]", "> lengths[:, None] + 1"),
        ("padding is seen", "src_key_padding_mask=padding", "src_key_padding_mask=None"),
    ),
    *of(
        "engine/model/neck.py",
        "model neck",
        ("running variance of the batch itself", "unbiased = var * n / (n - 1).clamp(min=1)", "unbiased = var"),
        ("variance of a sample", "sum(0)) / n  # around", "sum(0)) / (n - 1)  # around"),
        (
            "momentum direction of the mean",
            "self.running_mean), self.momentum",
            "self.running_mean), 1 - self.momentum",
        ),
        (
            "momentum direction of the variance",
            "self.running_var), self.momentum",
            "self.running_var), 1 - self.momentum",
        ),
        ("evaluation by the batch", "if not self.training:", "if False:"),
        (
            "mean of the rank alone",
            "total = summed(torch.cat([x.sum(0), x.new_tensor([len(x)])]))",
            "total = torch.cat([x.sum(0), x.new_tensor([len(x)])])",
        ),
        (
            "variance of the rank alone",
            "var = summed(((x - mean) ** 2).sum(0)) / n",
            "var = ((x - mean) ** 2).sum(0) / len(x)",
        ),
        ("a broken batch leaves its mean", "torch.where(finite, mean, self.running_mean)", "mean"),
        ("a broken batch leaves its variance", "torch.where(finite, unbiased, self.running_var)", "unbiased"),
    ),
    *of(
        "engine/losses.py",
        "losses",
        ("triplet on raw features", "unit = F.normalize(value, dim=-1)", "unit = value"),
        ("instructions compared about 0", "instructions - instructions.mean(0)", "instructions"),
        ("instructions never centred", "if config.centre and len(instructions) > 1:", "if False:"),
        ("opposite instructions as unlike as people", "torch.ones_like(unit[:, :1])", "unit[:, :0]"),
        ("plain triplet by the instructions", "if config.plain_triplet:", "if False:"),
        ("triplet weight ignored", "config.triplet_weight * world * triplet", "world * triplet"),
        ("margin ignored", "margin=config.margin", "margin=0.0"),
        ("identity loss without BNNeck", "head.classify[name](head.neck[name](value))", "head.classify[name](value)"),
        ("terms averaged", "torch.stack(list(terms.values())).sum()", "torch.stack(list(terms.values())).mean()"),
        ("matching: true pairs taken for wrong", "masked_fill(same, -1e9)", "masked_fill(same, -1.0)"),
        ("matching: the least alike picture", "(rows, columns), drawn, strict", "(rows, -columns), drawn, strict"),
        (
            "matching: a text's picture for a picture's text",
            "to_texts, to_pictures = pictures_BE @ texts.mT, texts_BE @ pictures.mT",
            "to_pictures, to_texts = pictures_BE @ texts.mT, texts_BE @ pictures.mT",
        ),
        (
            "matching: labels turned round",
            "labels[chosen[0]] == labels[chosen[1]]",
            "labels[chosen[0]] != labels[chosen[1]]",
        ),
        ("matching: lengths of other texts", "lengths[chosen[1]]", "lengths[chosen[0]]"),
        ("matching: tokens of other texts", "instruction.tokens[chosen[1]]", "instruction.tokens[chosen[0]]"),
        ("contrastive: positives of rows not shared out", "target / target.sum(1, keepdim=True)", "target"),
        ("matching: every draw the same", "at = drawn.to(cumulated)[:, None]", "at = 0 * drawn.to(cumulated)[:, None]"),
        (
            "contrastive: one direction",
            "(F.cross_entropy(rows, target) + F.cross_entropy(columns, target)) / 2",
            "F.cross_entropy(rows, target)",
        ),
        (
            "contrastive: only the diagonal is positive",
            "target = same.to(rows.dtype)",
            "target = torch.eye(len(same), dtype=rows.dtype)",
        ),
    ),
    *of(
        "engine/losses.py",
        "losses",
        ("a stream's weight left to its task", "weights.get(stream, weights", "weights.get(None, weights"),
        ("weights ignored", "total = weight * torch", "total = torch"),
    ),
    *of(
        "engine/schedule.py",
        "schedule",
        ("warm-up from 0", "return config.lr_start + (config.lr - config.lr_start) *", "return config.lr *"),
        ("cosine down to 0", "(0.01 + 0.99 * (1 +", "(1.00 * (1 +"),
        ("layer decay from the wrong end", "return depth - 1 - int(", "return int("),
        ("stem as deep as the first block", "return depth if name", "return depth - 1 if name"),
        ("layer decay ignored", "rate *= config.layer_decay", "rate *= 1.0"),
        ("vectors decay", "0.0 if plain else config.weight_decay", "config.weight_decay"),
        ("gates learn as slowly as what is pre-trained", '"edit.gates", ', ""),
    ),
    *of(
        "engine/average.py",
        "schedule",
        ("the average never moves", "self.values[name].lerp_(value, weight)", "pass"),
        ("no warm-up of the decay", "min(self.decay, step / (10 + step))", "self.decay"),
        ("counters averaged away", "self.values[name].copy_(value)\n\n    def load", "pass\n\n    def load"),
        ("the model itself is stored", "value.detach().clone() for", "value.detach() for"),
    ),
    *of(
        "engine/model/editing.py",
        "model",
        ("drop path keeps the wrong ones", "(drawn >= rates)", "(drawn < rates)"),
        ("drop path without enlarging", "/ (1 - rates)", "/ 1"),
        ("drop path: one draw for both branches", "keep_2B11[1] * edited", "keep_2B11[0] * edited"),
        ("drop path in evaluation", "if self.training and any(self.rates)", "if any(self.rates)"),
        ("checkpointing computes nothing again", "if self.checkpointing and", "if False and"),
    ),
    *of(
        "engine/losses.py",
        "equality",
        ("global: each rank its own pairs", "place() if config.global_losses else (0, 1)", "(0, 1)"),
        ("global: every rank the first rows", "rows = rank * B, (rank + 1) * B", "rows = 0, B"),
        (
            "global: pictures without their gradient",
            "gathered(pictures), gathered(texts)",
            "gathered_values(pictures), gathered(texts)",
        ),
        ("global: every rank draws alike", "[:, rank * B : (rank + 1) * B]", "[:, :B]"),
    ),
    *of(
        "engine/ranks.py",
        "equality",
        (
            "gathered: gradient of the rank alone",
            "out = grad.contiguous().clone()\n        dist.all_reduce(out)",
            "out = grad.contiguous().clone()",
        ),
    ),
    *of(
        "engine/data/sampler.py",
        "sampler",
        (
            "filling repeats identities",
            "following[~np.isin(following, labels)][: P - len(labels)]",
            "following[: P - len(labels)]",
        ),
        (
            "filling from the same epoch",
            "self._permuted(stream, epoch + 1, np.arange(P))",
            "self._permuted(stream, epoch, np.arange(P))",
        ),
        ("the short batch is dropped", "divmod(occurrence, -(-n // P))", "divmod(occurrence, n // P)"),
        (
            "every epoch the same",
            "_generator(self.seed, IDENTITIES, number, epoch)",
            "_generator(self.seed, IDENTITIES, number, 0)",
        ),
        (
            "every rank the first share",
            "slice(P // self.world * rank * K, P // self.world * (rank + 1) * K)",
            "slice(0, P // self.world * K)",
        ),
        ("ranks overlap", "slice(P // self.world * rank * K, ", "slice(P // self.world * rank, "),
        (
            "batch not a multiple of the ranks",
            "min(wish, stream.identities) // world * world",
            "min(wish, stream.identities)",
        ),
        ("permutation: n itself", "outside = values >= np.uint64(n)", "outside = values > np.uint64(n)"),
        ("permutation: no walk", "outside = values >= np.uint64(n)", "outside = np.zeros(len(values), bool)"),
        ("permutation: keys unused", "mixed = (right + key)", "mixed = (right)"),
        ("permutation: two rounds", "for key in keys:", "for key in keys[:2]:"),
        ("permutation: rounds alike", "mixed = (right + key)", "mixed = (right + keys[0])"),
        ("images repeat", "            held[held == swapped[i]] = i\n", "            pass\n"),
        ("draws repeat after the first swap", "for i in reversed(range(t)):", "for i in range(t):"),
        ("a round's last image never first", "(n - steps % n)", "(n - steps % n - 1).clip(1)"),
        ("rounds run into each other", "(n - steps % n)", "n"),
        ("an image that repeats comes from any round", "return drawn % n", "return np.minimum(drawn, n - 1)"),
        ("identities draw alike", "generator.random((count, len(n)))", "generator.random((count, 1))"),
        ("vi: one modality", "middles + draw(np.where(both, stops -", "starts + draw(np.where(both, stops -"),
        ("vi: only few of the visible", "np.where(both, middles - starts, 1)", "np.where(both, 1, 1)"),
        ("vi: who has one modality is split", "(starts < middles) & (middles < stops)", "middles < stops"),
        ("vi: who lacks infrared is split", "(starts < middles) & (middles < stops)", "starts < middles"),
        ("modalities part one image late", "np.searchsorted(key, key[starts[:-1]] | 1)", "starts[:-1] + 1"),
        ("every task splits by modality", "stream.task.cross_modal and K > 1", "K > 1"),
        ("temperature: the wrong root", "** (1 / temperature)", "** temperature"),
        ("temperature: over the largest", "/ min(images))", "/ max(images))"),
        ("temperature: rounded down", "np.rint(weights)", "np.floor(weights)"),
        ("temperature: no end of a cycle", "if weights.sum() > LONGEST:", "if False:"),
        ("temperature: a window is a cycle", "len(streams) if temperature else len(self.cycle)", "len(self.cycle)"),
        ("temperature unused", "if temperature:", "if False:"),
        (
            "a stream's steps skip",
            "before = cycle * self.shares[number] +",
            "before = micro_step + 0 * self.shares[number] +",
        ),
        ("every cycle in the same order", "ORDER, int(early), cycle)", "ORDER, int(early), 0)"),
        ("seed ignored", "np.array([seed, purpose", "np.array([0, purpose"),
        ("streams draw alike", "purpose << 32 | stream]", "purpose << 32]"),
        (
            "images of every step alike",
            "_generator(self.seed, IMAGES, stream.number, occurrence)\n",
            "_generator(self.seed, IMAGES, stream.number, 0)\n",
        ),
        (
            "augmentation of every step alike",
            "augmentation = generator.random((14, P * K), dtype=np.float32)",
            "augmentation = np.random.default_rng(0).random((14, P * K), dtype=np.float32)",
        ),
        (
            "queries ask for their own clothes",
            "generator.integers(asking, K, size",
            "generator.integers(0, asking, size",
        ),
        ("nobody asks", "instruction_rows = _as_queries(rows.reshape(P, K), generator).ravel()", "pass"),
        ("always the first description", "choice = generator.random(P * K)", "choice = np.zeros(P * K)"),
        ("always the first sentence", "sentence = int(generator.integers(20))", "sentence = 0"),
        (
            "augmentation of another rank",
            "_augmentation(augmentation[:, mine]",
            "_augmentation(augmentation[:, : len(rows[mine])]",
        ),
        ("labels shifted", "np.repeat(labels, K)[mine]", "np.repeat(labels, K)[mine] + 1"),
        ("labels out of step with images", "np.repeat(labels, K)[mine]", "np.tile(labels, K)[mine]"),
        (
            "identities mixed up",
            "key = index.pid[rows] << 1 | index.modality[rows]",
            "key = index.modality[rows].astype(int) << 31 | index.pid[rows]",
        ),
        ("never sorted", "if np.any(key[1:] < key[:-1]):", "if False:"),
        ("sorted by identity alone", " << 1 | index.modality[rows]", " << 1"),
        ("streams hold their rows twice", "if (index.name, told) not in layouts:", "if True:"),
        (
            "the replacement of the one before",
            "key=lambda label: pid[rows[stream.starts[label]]])",
            "key=lambda label: pid[rows[stream.starts[label]]] + 1)",
        ),
        ("images without a description", "index.sentences(rows) > 0", "index.sentences(rows) >= 0"),
        ("the damaged image again", "rows[rows != row]", "rows"),
        ("strangers who are present", "if label not in present:", "if True:"),
        ("columns of one array", "np.ascontiguousarray(part.T) for", "part.T for"),
        ("erasing everything", "(u[5] < 0.5)", "(u[5] < 2)"),
    ),
    *of(
        "engine/data/files.py",
        "checking",
        ("a checksum that does not match", "if item.crc >= 0 and zlib", "if False and zlib"),
        ("another place of a shard", "item.size, item.offset)", "item.size, 0)"),
        ("any kind of file", "formats=FORMATS", "formats=None"),
        ("blue for red", 'simplejpeg.decode_jpeg(content, "RGBX")', 'simplejpeg.decode_jpeg(content, "BGRX")'),
    ),
    *of(
        "engine/data/checking.py",
        "checking",
        ("damaged files are not looked into again", "(damaged[was] == 0) & ", ""),
        (
            "what was known comes last",
            "np.arange(same.sum()), same.sum() + np.arange(len(fresh))",
            "len(fresh) + np.arange(same.sum()), np.arange(len(fresh))",
        ),
        ("overlap: content unseen", "found |= (pixels >= 0) & ", "found &= (pixels >= 0) & "),
        ("overlap: by name alone", "len(path.parent.name) > 3 and other.name.startswith(path.parent.name)", "True"),
        ("overlap: of training images, too", ".to_numpy()[test])", ".to_numpy())"),
        ("the journal stays", "index.save(file)\n        forget(file)\n", "index.save(file)\n"),
        ("a killed process's part stays", "part.unlink(missing_ok=True)", "pass"),
        ("nobody is told", 'say(f"{path}: {reason}")', "pass"),
    ),
    *of(
        "engine/data/packing.py",
        "checking",
        ("no reading back", "!= crcs[row]:", "!= crcs[row] and False:"),
        ("no padding", "position += length + -(-size // BLOCK) * BLOCK", "position += length + size"),
        ("left-overs stay", "if left.name not in names and OURS", "if False and OURS"),
        ("a name for any content", "digest.update(", "hash("),
        ("damaged images are packed", "np.flatnonzero(index.damaged == 0)", "np.flatnonzero(index.damaged >= 0)"),
        ("one shard", "if rows and position + length + size > shard_bytes:", "if False:"),
    ),
    *of(
        "engine/data/index.py",
        "checking index",
        ("damaged images are selected", "keep &= self.damaged == 0", "keep &= True"),
        ("a shard cut short", "if found != size:", "if False:"),
        ("pictures of other records", "(wanted, value_set=known)", "(wanted, value_set=named)"),
    ),
    *of(
        "engine/data/pipeline.py",
        "augment pipeline",
        ("damage unnoticed", "damaged[items[i].path] = str(reason)", "pass"),
        ("the same batch again", "number = self.number + len(self.ahead)", "number = self.number"),
        ("reading past the end", "number >= self.batches:", "False:"),
        ("hue unturned", "np.sin(angle) * saturation, -np.sin(angle) * saturation", "0, 0"),
        ("contrast about black", "brightness * (128 - 128 * contrast)", "0 * brightness"),
        ("shift by another unit", "drawn.shift * REACH", "drawn.shift * PADDING / 2"),
    ),
    *of(
        "engine/model/pretrained.py",
        "pretrained",
        ("position of the distillation token kept", "[:, 2:]], 1)", "[:, 1:-1]], 1)"),
        (
            "class behind the parts",
            '["cls_pos", *(f"part{i + 1}_pos" for i in range(count)), "pos_embed"]',
            '[*(f"part{i + 1}_pos" for i in range(count)), "cls_pos", "pos_embed"]',
        ),
        ("mean folded the wrong way", "(own_mean - mean) / std", "(mean - own_mean) / std"),
        (
            "std folded the wrong way",
            "(own_std / std)[:, None, None]).float()",
            "(std / own_std)[:, None, None]).float()",
        ),
        ("old names of a norm's bias", '(".beta", ".bias")', '(".beta", ".beta")'),
        ("parts resampled as patches", "num_prefix_tokens=first", "num_prefix_tokens=1"),
        ("a tall grid read as a wide one", "before = (2 * half, half)", "before = (half, 2 * half)"),
        ("code of a file is run", "weights_only=True", "weights_only=False"),
        ("padding that is another word", 'if lacking or known["[PAD]"] != 0:', "if lacking:"),
        ("another BERT's vocabulary", "if tokenizer.get_vocab_size() != count:", "if False:"),
        ("timm's other epsilon", "module.eps != 1e-6", "module.eps != module.eps"),
        ("resumed with another stem", 'PLAIN if "instruct.picture" in stored.given else {}', "{}"),
        ("towers that should stay are trained", "self.config.frozen))", "()))"),
    ),
    *of(
        "kernels/augment.py",
        "augment",
        ("shift cut", "np.rint(table", "np.floor(table"),
        ("colours left alone", "= colours is not None", "= False"),
        ("a channel that is none", "if not np.isin(chosen, (0, 1, 2)).all():", "if False:"),
    ),
]


def run(folder: Path, tests: tuple[str, ...], log: Path) -> int:
    """pytest's exit code in a fork that sees `folder`'s modules; negative: the signal that ended it."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.setsid()
            resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.chdir(folder)
            sys.path.insert(0, str(folder))
            import pytest

            options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not gpu and not slow"]
            code = int(pytest.main([*options, *tests]))
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # processes that a failed test left behind
    return os.waitstatus_to_exitcode(status)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="WORD", help="only mutants whose file or description holds a word")
    parser.add_argument("--most", type=int, default=1 << 30, metavar="N", help="N mutants, spread over those chosen")
    parser.add_argument("--list", action="store_true", help="print the mutants and end")
    args = parser.parse_args(arguments)
    ours = [m for m in MUTANTS if m.interpreted == INTERPRETED]
    chosen = [m for m in ours if not args.words or any(word in f"{m.file} {m.breaks} " for word in args.words)]
    chosen = chosen[:: -(-len(chosen) // args.most)] if chosen else chosen
    try:
        sources = [mutant.applied() for mutant in chosen]
    except ValueError as error:
        print(f"error: {error}; adjust tests/mutate.py", file=sys.stderr)
        return 1
    if args.list:
        print("\n".join(f"{mutant.file:26} {mutant.breaks}" for mutant in chosen))
        return 0
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    for name in [name for name in os.environ if name.startswith("PYTEST")]:
        del os.environ[name]
    sys.dont_write_bytecode = True  # a stale .pyc could stand for a file swapped within its second
    sys.path[:] = [path for path in sys.path if path not in ("", str(ROOT), str(ROOT / "tests"))]
    for library in LIBRARIES:
        importlib.import_module(library)
    failed, began = [], time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder, log = Path(temporary) / "tree", Path(temporary) / "log"
        folder.mkdir()
        ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
        for name in COPIED:
            source = ROOT / name
            shutil.copytree(source, folder / name, ignore=ignore) if source.is_dir() else shutil.copy(source, folder)
        tests = tuple(sorted({test for mutant in chosen for test in mutant.tests}))
        if (code := run(folder, tests, log)) != 0:
            print(f"{log.read_text()[-3000:]}\nerror: without a mutant, pytest {' '.join(tests)} ends with {code}")
            return 1
        print(f"{time.monotonic() - began:6.1f} s  unchanged: {len(tests)} test files pass", flush=True)
        for mutant, source in zip(chosen, sources, strict=True):
            start, file = time.monotonic(), folder / mutant.file
            file.write_text(source)
            code = run(folder, mutant.tests, log)
            shutil.copy(ROOT / mutant.file, file)
            verdict = "SURVIVED" if code == 0 else "killed" if code == 1 or code < 0 else "BROKEN"
            print(f"{time.monotonic() - start:6.1f} s  {verdict:8}  {mutant.file:26} {mutant.breaks}", flush=True)
            if verdict != "killed":
                failed.append(mutant)
            if verdict == "BROKEN":
                print(log.read_text()[-1500:])
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    took = f"{time.monotonic() - began:.0f} s ({used.ru_utime + used.ru_stime:.0f} s of processor time)"
    print(f"{len(chosen) - len(failed)} of {len(chosen)} mutants killed in {took}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
