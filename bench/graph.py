"""`Graph`: an R-MAT graph and the ranks of its vertices, as they lie in one array of words.

The graph is made row by row. In R-MAT (D. Chakrabarti, Y. Zhan and C. Faloutsos, 2004) each bit of
an edge's two ends is drawn with the probabilities A, B, C, D of the four quadrants; so how many
edges a row has follows from the bits of its own number, and given those, the other end's bits are
independent. That needs no sorting, and no more memory than a chunk.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .share import Array

__all__ = ["Graph", "make_graph"]

A, B, C, D = 0.57, 0.19, 0.19, 0.05
"""Graph500's."""
DEGREE = 20
"""Edges of a vertex, about: it makes the graph some nine tenths of the array."""
_VERTEX_BYTES = 4 * 8
_EDGE_BYTES = 4
CHUNK_EDGES = 1 << 19
_COUNTED_EDGES = 1 << 24
_SURE = 0.99
"""The part of the room for edges that is asked for, since degrees are random."""


class Graph:
    """Views of an array of words.

    Parameters
    ----------
    a : ndarray
        Words, shape (words,).

    Attributes
    ----------
    starts : ndarray
        Where each vertex's edges begin, and the end of the last one's.
    inverse : ndarray
        One by the edges that leave a vertex; 0 where there are none.
    ranks, parts : ndarray
        Each vertex's rank; what of it goes along each of its edges.
    sources : ndarray
        Where the edges into a vertex come from, by vertex.
    """

    def __init__(self, a: Array) -> None:
        scale = (a.nbytes // (_VERTEX_BYTES + _EDGE_BYTES * DEGREE)).bit_length() - 1
        n = self.count = 1 << scale
        self.scale = scale
        self.starts = a[: n + 1].view(np.int64)
        self.inverse = a[n + 1 : 2 * n + 1].view(np.float64)
        self.ranks = a[2 * n + 1 : 3 * n + 1].view(np.float64)
        self.parts = a[3 * n + 1 : 4 * n + 1].view(np.float64)
        self.sources = a[4 * n + 1 :].view(np.uint32)

    def chunks(self) -> list[tuple[int, int]]:
        """Return ranges of vertices of not too many edges; a vertex is never divided."""
        marks = np.arange(0, self.starts[-1], CHUNK_EDGES)
        by_edges = np.searchsorted(self.starts, marks, side="right") - 1
        by_vertices = np.arange(0, self.count, CHUNK_EDGES // DEGREE)
        bounds = np.unique(np.concatenate([[0], by_edges, by_vertices, [self.count]]))
        return list(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True))


def _degrees(graph: Graph, random: np.random.Generator) -> npt.NDArray[np.int64]:
    mean = np.full(1, _SURE * len(graph.sources))
    for _ in range(graph.scale):
        mean = np.concatenate([mean * (A + B), mean * (C + D)])
    found: npt.NDArray[np.int64] = random.poisson(mean)
    return found


def _draw(rows: npt.NDArray[np.uint32], scale: int, random: np.random.Generator) -> Array:
    """Draw the other ends of edges, each of which has a row already."""
    found = np.zeros(len(rows), np.uint32)
    limits = np.array([256 * B / (A + B), 256 * D / (C + D)]).round().astype(np.uint8)
    for level in range(scale):
        bits = (rows >> np.uint32(level)).astype(np.uint8) & np.uint8(1)
        drawn = np.frombuffer(random.bytes(len(rows)), np.uint8) < limits[bits]
        found |= drawn.astype(np.uint32) << np.uint32(level)
    return found


def make_graph(a: Array, seed: int) -> None:
    """Write a graph into an array of words; the ranks are not set."""
    graph, random = Graph(a), np.random.default_rng(seed)
    degrees = _degrees(graph, random)
    starts = np.zeros(graph.count + 1, np.int64)
    np.cumsum(degrees, out=starts[1:])
    np.minimum(starts, len(graph.sources), out=starts)
    graph.starts[:] = starts
    for first, last in graph.chunks():
        rows = np.repeat(np.arange(first, last, dtype=np.uint32), np.diff(starts[first : last + 1]))
        graph.sources[starts[first] : starts[last]] = _draw(rows, graph.scale, random)
    leaving = np.zeros(graph.count, np.int64)
    for first in range(0, int(starts[-1]), _COUNTED_EDGES):
        sources = graph.sources[first : min(first + _COUNTED_EDGES, int(starts[-1]))]
        leaving += np.bincount(sources, minlength=graph.count)
    graph.inverse[:] = np.divide(1.0, leaving, out=np.zeros(graph.count), where=leaving > 0)
