"""Which part of a TensorFlow graph a model needs, and whether that part only computes.

A graph is a program, and TensorFlow runs whatever it says: it can call Python, read and write any file, and send what
it reads elsewhere. So a graph is cut down to what its outputs, its restore and its initializer reach, before
TensorFlow sees it; and each operation that is left must be known to touch nothing but tensors. It opens no file.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tensorflow.core.framework import attr_value_pb2, graph_pb2, types_pb2
from tensorflow.python.framework import op_def_registry

from remote_ops.errors import SpecError

__all__ = ["CALLS", "Root", "needed_part", "node_of"]

CALLS = ("PartitionedCall", "StatefulPartitionedCall")
# Operations that read a file, and which of their inputs names it: a root may trust one.
_READERS = {"RestoreV2": 0, "InitializeTableFromTextFileV2": 1, "InitializeTableFromTextFile": 1}

# Stateful operations are refused unless their state is a variable, a random generator, a table, an array or a lock.
_STATEFUL = re.compile(
    r"Variable(V2)?|VarHandleOp|(Read|Assign|AssignAdd|AssignSub)VariableOp|VarIsInitializedOp|VariableShape"
    r"|TemporaryVariable|DestroyTemporaryVariable|DisableCopyOnRead|Empty|DeepCopy|GuaranteeConst"
    r"|Resource(Sparse)?(Apply|Gather|Scatter|Strided|CountUpTo|Initialized)\w*"
    r"|(Stateful)?PartitionedCall|If|While|Case|Assert|CheckNumerics(V2)?|Print|PrintV2|Timestamp|DeviceIndex"
    r"|Random\w+|TruncatedNormal|ParameterizedTruncatedNormal|Multinomial|Stateful\w+|StatelessRandomGetAlg"
    r"|Rng(Skip|ReadAndSkip)|NonDeterministicInts|SampleDistortedBoundingBox(V2)?|NegTrain"
    r"|(All|LogUniform|Uniform|LearnedUnigram|ThreadUnsafeUnigram)CandidateSampler"
    r"|(Anonymous)?(Mutable)?(Dense)?HashTable(OfTensors)?(V2)?|LookupTable\w+|InitializeTableV2"
    r"|TensorArray\w*|Stack((V2|Push|Pop|Close)\w*)?|CudnnRNN\w*|MutexV2|MutexLock|ConsumeMutexLock"
)
# Stateless ones are taken, but for these: they touch files or the network, call Python or foreign code, or hold a
# pointer in an attribute. Those that begin with `_` are TensorFlow's own, between its passes.
_REFUSED = re.compile(
    r"\w*(PyFunc|ReadFile|WriteFile|MatchingFiles|TextFile|Dataset|Iterator|Reader|Snapshot|Save|Restore|Vocab|Proto"
    r"|Remote|Rpc|Send|Recv|Collective|Nccl|Queue|Session|Checkpoint|Server|Library|TRTEngine|CustomCall"
    r"|DTensor|Barrier|Accumulator|Infeed|Prelinearize|Relayout|Aggregator|Passthrough)\w*"
    r"|_(?!Fused)\w*|_?Xla(Launch|Host|CallModule)\w*|T[Pp][Uu]\w*|Debug\w*|Copy(Host|Op|ToMesh\w*)?|ImmutableConst"
    r"|HostConst|Abort|FixedUnigramCandidateSampler|RandomDataset\w*|StatefulRandomDataset\w*"
)
_HANDLES = {types_pb2.DT_RESOURCE, types_pb2.DT_VARIANT}
_PLAIN_STREAMS = (b"stderr", b"stdout", b"log(info)", b"log(warning)", b"log(error)")


@dataclass(frozen=True)
class Root:
    """What will be run: nodes, and the tensors among what they reach that name a file which may be read."""

    nodes: Sequence[str]
    files: frozenset[str] = frozenset()
    may: tuple[str, ...] = ()


def node_of(tensor: str) -> str:
    """The node that a tensor or a control input belongs to: `a` of `a:1` and of `^a`."""
    return tensor.removeprefix("^").partition(":")[0]


def needed_part(graph: Any, roots: Iterable[Root], place: str) -> Any:
    """The nodes and functions of a GraphDef that the roots reach, in the order of the file; a new GraphDef.

    Raises:
        SpecError: an operation that does more than compute is among them, or one that nothing here defines.
    """
    walk = _Walk(graph)
    for root in roots:
        walk.start(root, place)
    if walk.refused:
        raise _refusal(walk.refused, place)
    part = graph_pb2.GraphDef(versions=graph.versions)
    for node in graph.node:
        if node.name in walk.kept:
            kept = part.node.add()
            kept.CopyFrom(node)
            kept.device = ""
            kept.attr.pop("_class", None)  # may name nodes that are gone
    for function in graph.library.function:
        if function.signature.name in walk.called:
            kept_function = part.library.function.add()
            kept_function.CopyFrom(function)
            for node in kept_function.node_def:
                node.device = ""
    for kind in ("gradient", "registered_gradients"):
        getattr(part.library, kind).extend(
            entry for entry in getattr(graph.library, kind) if entry.gradient_func in walk.called
        )
    return part


@dataclass
class _Walk:
    """What was found on the way through a graph: the nodes and functions reached, and operations to refuse."""

    graph: Any
    kept: set[str] = field(default_factory=set)
    called: set[str] = field(default_factory=set)
    refused: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        library = self.graph.library
        self.nodes = {node.name: node for node in self.graph.node}
        self.functions = {function.signature.name: function for function in library.function}
        registered = library.registered_gradients
        self.gradients = {entry.registered_op_type.encode(): entry.gradient_func for entry in registered}
        self.gradients_of = {entry.function_name: entry.gradient_func for entry in library.gradient}
        everywhere = [self.graph.node, *(function.node_def for function in library.function)]
        self._variables = Counter(_resource(node) for nodes in everywhere for node in nodes if node.op == "VarHandleOp")
        self._seen: set[tuple[str, frozenset[int], tuple[str, ...]]] = set()

    def start(self, root: Root, place: str) -> None:
        """Follow a root through nodes, and through the functions that they call."""
        reached: set[str] = set()
        waiting = list(root.nodes)
        while waiting:
            name = waiting.pop()
            if name in reached:
                continue
            if name not in self.nodes:
                raise SpecError(f"the graph has no node '{name}', which it says it needs", path=place)
            reached.add(name)
            waiting.extend(node_of(tensor) for tensor in self.nodes[name].input)
        self.kept |= reached
        files = {_full(tensor) for tensor in root.files}

        def named_by_us(tensor: str) -> bool:
            return _comes_from(tensor, self.nodes, lambda name: _full(name) in files, self._assigned)

        for name in reached:
            self._check(self.nodes[name], f"node '{name}'", named_by_us, root.may)

    def _call(self, name: str, trusted: frozenset[int], may: tuple[str, ...]) -> None:
        """Follow a call of a function; `trusted` are the arguments that name files which may be read."""
        waiting = [(name, trusted)]
        if name in self.gradients_of:
            waiting.append((self.gradients_of[name], frozenset()))
        for callee, given in waiting:
            function = self.functions.get(callee)
            if function is None:
                self.refused.setdefault(callee, "a function that the file lacks")
            elif (callee, given, may) not in self._seen:
                self._seen.add((callee, given, may))
                self.called.add(callee)
                self._body(function, given, may)

    def _body(self, function: Any, trusted: frozenset[int], may: tuple[str, ...]) -> None:
        nodes = {node.name: node for node in function.node_def}
        files = {argument.name for index, argument in enumerate(function.signature.input_arg) if index in trusted}

        def named_by_us(tensor: str) -> bool:
            return _comes_from(tensor, nodes, files.__contains__, lambda handle: "")

        for node in function.node_def:
            self._check(node, f"function '{function.signature.name}'", named_by_us, may)

    def _check(self, node: Any, place: str, named_by_us: Callable[[str], bool], may: tuple[str, ...]) -> None:
        """Refuse a node, or follow what it calls."""
        known = node.op in self.functions
        if not known and (reason := _reason(node, named_by_us, may)):
            self.refused.setdefault(node.op, f"{reason}, in {place}")
        trusted = frozenset(index for index, tensor in enumerate(node.input) if named_by_us(tensor))
        if known:
            self._call(node.op, trusted, may)
        for name, value in node.attr.items():
            if name == "_gradient_op_type":
                if value.s in self.gradients:
                    self._call(self.gradients[value.s], frozenset(), ())
                continue
            for function in (value.func, *value.list.func):
                if function.name:
                    passed = trusted if node.op in CALLS else frozenset()
                    self._call(function.name, passed, may)

    def _assigned(self, handle: str) -> str:
        """The one tensor that a variable of the graph is ever assigned; '' if that is not certain.

        TensorFlow 2 passes the name of an asset through such a variable.
        """
        variable = self.nodes.get(node_of(handle))
        if variable is None or variable.op != "VarHandleOp" or self._variables[_resource(variable)] != 1:
            return ""
        users = [node for node in self.graph.node if any(node_of(tensor) == variable.name for tensor in node.input)]
        assigns = [node for node in users if node.op == "AssignVariableOp" and len(node.input) > 1]
        harmless = all(node.op in ("ReadVariableOp", "VarIsInitializedOp", "AssignVariableOp") for node in users)
        return str(assigns[0].input[1]) if harmless and len(assigns) == 1 else ""


def _comes_from(
    tensor: str, nodes: Mapping[str, Any], trusted: Callable[[str], bool], assigned: Callable[[str], str]
) -> bool:
    """Whether a tensor is one that is trusted, perhaps passed on."""
    for _ in range(len(nodes) + 1):
        if tensor.startswith("^") or not tensor:
            return False
        if trusted(tensor):
            return True
        node = nodes.get(node_of(tensor))
        if node is None or node.op not in ("Identity", "ReadVariableOp") or not node.input:
            return False
        tensor = node.input[0] if node.op == "Identity" else assigned(node.input[0])
    return False


def _resource(node: Any) -> tuple[bytes, bytes]:
    """What a handle of a variable stands for: two of the same are one variable."""
    return _attr(node, "container").s, _attr(node, "shared_name").s or node.name.encode()


def _attr(node: Any, name: str) -> Any:
    """An attribute, an empty one if it is not there: to index it would put it there."""
    return node.attr[name] if name in node.attr else attr_value_pb2.AttrValue()


def _full(tensor: str) -> str:
    return tensor if ":" in tensor else f"{tensor}:0"


def _reason(node: Any, named_by_us: Callable[[str], bool], may: tuple[str, ...]) -> str:
    """Why an operation is refused; '' if it is not."""
    definition = op_def_registry.get(node.op)
    if definition is None:
        return "no operation that is defined here"
    if node.op in _READERS:
        at = _READERS[node.op]
        if node.op in may and at < len(node.input) and named_by_us(node.input[at]):
            return ""
        return "reads a file of the model's choosing"
    if _REFUSED.fullmatch(node.op) or (definition.is_stateful and not _STATEFUL.fullmatch(node.op)):
        return "does more than compute"
    if node.op in ("Const", "ParseTensor") and {_attr(node, name).type for name in ("dtype", "out_type")} & _HANDLES:
        return "makes a handle of something that is not the model's"
    if node.op == "PrintV2" and _attr(node, "output_stream").s not in (b"", *_PLAIN_STREAMS):
        return "writes a file"
    return ""


def _refusal(refused: Mapping[str, str], place: str) -> SpecError:
    shown = [f"{name} ({reason})" for name, reason in sorted(refused.items())]
    more = f" and {len(shown) - 8} more" if shown[8:] else ""
    return SpecError(
        f"this graph is refused, for a model file may run no code of its own and touch no other file: it holds "
        f"{', '.join(shown[:8])}{more}; save a signature that only computes",
        path=place,
    )
