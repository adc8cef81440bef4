"""Control flow: blocks put in an order in which threads that went apart meet again.

Of the threads that can run, those at the lowest position run first. In a topological order with
every loop in one piece, a block that all paths lead to comes after those paths, so that all wait
there for the last. (Cf. "thread frontiers", Diamos et al., MICRO 2011.)
"""

from __future__ import annotations

from .parse import Body, Instruction, Symbol

ENDS = ("ret", "exit", "trap")


def is_branch(instruction: Instruction) -> bool:
    return instruction.op[0] in ("bra", "brx")


def destinations(body: Body, instruction: Instruction) -> list[int]:
    """Where a branch can go, besides on."""
    last = instruction.operands[-1]
    assert isinstance(last, Symbol)
    names = body.targets[last.name] if instruction.op[0] == "brx" else [last.name]
    return [body.labels[name] for name in names]


def falls_through(instruction: Instruction) -> bool:
    """Whether some thread may go on to the next instruction."""
    return instruction.guard is not None or instruction.op[0] not in ("bra", "brx", *ENDS)


def blocks(body: Body) -> tuple[list[tuple[int, int]], list[list[int]]]:
    """Ranges of instructions, and the blocks that follow each; one past all ends the entry."""
    count = len(body.instructions)
    starts = {0, *(i for i in body.labels.values() if i < count)}
    for i, instruction in enumerate(body.instructions[:-1]):
        if is_branch(instruction) or instruction.op[0] in ENDS:
            starts.add(i + 1)
    ordered = sorted(starts)
    ranges = list(zip(ordered, [*ordered[1:], count], strict=True))
    number = {start: i for i, start in enumerate(ordered)}
    following = []
    for _, end in ranges:
        last = body.instructions[end - 1]
        after = (
            [number[d] for d in destinations(body, last) if d in number] if is_branch(last) else []
        )
        if falls_through(last) and end in number:
            after.append(number[end])
        following.append(after)
    return ranges, following


def order(following: list[list[int]]) -> list[int]:
    """All blocks that can be reached, topologically, each loop in one piece."""
    return _order(0, set(range(len(following))), following)


def _order(first: int, inside: set[int], following: list[list[int]]) -> list[int]:
    """The same within `inside`, entered at `first`, whose back edges are left out."""
    edges = {b: [f for f in following[b] if f in inside and f != first] for b in inside}
    placed: list[int] = []
    for component in reversed(_components(first, edges)):
        if len(component) == 1:
            placed += component
        else:
            # Its last block is the one that was come to first: where the loop is entered.
            placed += _order(component[-1], set(component), following)
    return placed


def _components(first: int, edges: dict[int, list[int]]) -> list[list[int]]:
    """Strongly connected components that `first` reaches, each after those that it leads to
    (Tarjan, without recursion)."""
    index: dict[int, int] = {first: 0}
    low = {first: 0}
    stack, found = [first], []
    waiting = set(stack)
    work = [(first, iter(edges[first]))]
    while work:
        block, rest = work[-1]
        for after in rest:
            if after not in index:
                index[after] = low[after] = len(index)
                stack.append(after)
                waiting.add(after)
                work.append((after, iter(edges[after])))
                break
            if after in waiting:
                low[block] = min(low[block], index[after])
        else:
            work.pop()
            if work:
                low[work[-1][0]] = min(low[work[-1][0]], low[block])
            if low[block] == index[block]:
                component: list[int] = []
                while not component or component[-1] != block:
                    component.append(stack.pop())
                    waiting.discard(component[-1])
                found.append(component)
    return found
