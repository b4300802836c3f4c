"""Serialization of values as plain data, for the pipe between an answer's process and the judge.

The judge rebuilds exact instances of the types of Python and NumPy from plain data, so that it runs no method of an
answer's class, such as `__eq__`. Other objects are sent as references (`Remote`). Only the standard library is
imported; NumPy is imported when one of its values arrives.
"""

import array
import collections
import copyreg
import datetime
import decimal
import fractions
import importlib
import itertools
import json
import sys

MAX_ITEMS = 10**6  # items taken from an iterator
SCALARS = (str, int, float)
# Mutable containers: they keep their identity within a call, and their changes are sent back.
CONTAINERS = (
    *(collections.Counter, collections.OrderedDict, collections.defaultdict, collections.deque),
    *(dict, list, set, bytearray, array.array),
)
# Values that `__reduce_ex__` describes as a constructor and its arguments.
REDUCED = (
    *(complex, range, slice, decimal.Decimal, fractions.Fraction),
    *(datetime.date, datetime.datetime, datetime.time, datetime.timedelta, datetime.timezone),
)
TYPES = {
    kind.__name__: kind for kind in (*SCALARS, *CONTAINERS, *REDUCED, object, bool, type(None), bytes, tuple, frozenset)
}
VIEWS = {type({}.keys()): "keys", type({}.values()): "values", type({}.items()): "items"}


class Remote:
    """Reference to an object of the answer's process that is no plain value, such as a function or a tree node.

    Two references are equal if they refer to the same object; the answer's `__eq__` is never called.
    """

    def __init__(self, link, ref):
        object.__setattr__(self, "_link", link)
        object.__setattr__(self, "_ref", ref)

    def __call__(self, *args, **kwargs):
        return self._link.ask("call", self._ref, *args, **kwargs)

    def __getattr__(self, name):
        return self._link.ask("get", self._ref, name)

    def __setattr__(self, name, value):
        self._link.ask("set", self._ref, name, value)

    def __eq__(self, other):
        return isinstance(other, Remote) and other._ref == self._ref

    def __hash__(self):
        return hash(self._ref)


class RemoteException(BaseException):
    """Base of the judge's substitutes for exception classes that the answer defines."""

    _ref = None
    _text = ""

    def __str__(self):
        return self._text


class Encoder:
    """Values in JSON, for one message: scalars as they are, everything else as [tag, ...].

    Args:
        keep: Stores an object that is no plain value, and returns its number.
        shared: Containers that the receiver has too, known by their position in this list.
        consume: Whether to encode an iterator by its items, which consumes it, or by its identity.
    """

    def __init__(self, keep, shared=(), consume=True):
        self.keep, self.consume = keep, consume
        self.containers = list(shared)  # which also keeps their ids from being used again
        self._known = {id(container): i for i, container in enumerate(self.containers)}

    def __call__(self, value):
        if value is None or isinstance(value, bool):
            return value
        numpy = sys.modules.get("numpy")
        if numpy is not None and isinstance(value, (numpy.generic, numpy.ndarray)):
            return self._numpy(value, numpy)
        for kind in SCALARS:
            if isinstance(value, kind):
                return kind(value)
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, Remote):
            return ["remote", value._ref]
        if isinstance(value, CONTAINERS):
            return self._container(value)
        return self._immutable(value)

    def _immutable(self, value):
        if isinstance(value, bytes):
            return ["bytes", bytes(value).hex()]
        for kind in (tuple, frozenset):
            if isinstance(value, kind):
                return [kind.__name__, self._each(kind.__iter__(value))]
        if type(value) in REDUCED:
            make, args = value.__reduce_ex__(2)[:2]
            args = args[1:] if make is copyreg.__newobj__ else args
            return ["value", type(value).__name__, self._each(args)]
        for kind, name in VIEWS.items():
            if isinstance(value, kind):
                return ["view", name, self(dict(value.mapping))]
        if isinstance(value, BaseException):
            return ["error", self(type(value)), self._each(value.args), self(dict(vars(value))), str(value)[:1000]]
        if self.consume and hasattr(value, "__next__") and hasattr(value, "__iter__"):
            return ["iterator", self._each(itertools.islice(value, MAX_ITEMS))]
        return ["remote", self.keep(value)]

    def _each(self, items):
        return [self(item) for item in items]

    def _class(self, kind):
        if TYPES.get(kind.__name__) is kind:
            return ["type", kind.__name__]
        if not issubclass(kind, BaseException):
            return ["remote", self.keep(kind)]
        if issubclass(kind, RemoteException):
            return ["remote", kind._ref]
        bases = [self(base) for base in kind.__bases__ if issubclass(base, BaseException)]
        return ["exception", self.keep(kind), str(kind.__module__)[:80], str(kind.__name__)[:80], bases]

    def _container(self, value):
        if id(value) in self._known:
            return ["known", self._known[id(value)]]
        self._known[id(value)] = len(self.containers)
        self.containers.append(value)
        return ["container", self._known[id(value)], *self.contents(value)]

    def contents(self, value):
        """Type, arguments of its constructor, and items of a container."""
        if not isinstance(value, CONTAINERS):  # an array of NumPy
            shape = list(value.shape)
            if value.dtype.hasobject:
                return "ndarray", [shape, "O"], self._each(value.ravel().tolist())
            return "ndarray", [shape, value.dtype.str], [value.tobytes().hex()]
        kind = next(kind for kind in CONTAINERS if isinstance(value, kind))
        if issubclass(kind, dict):
            args = [self(value.default_factory)] if kind is collections.defaultdict else []
            return kind.__name__, args, [self._each(pair) for pair in kind.items(value)]
        if kind is bytearray:
            return kind.__name__, [], [value.hex()]
        args = {collections.deque: lambda: [["tuple", []], value.maxlen], array.array: lambda: [value.typecode]}
        return kind.__name__, args.get(kind, list)(), self._each(kind.__iter__(value))

    def _numpy(self, value, numpy):
        if value.dtype.names is not None:
            return ["remote", self.keep(value)]
        if isinstance(value, numpy.generic):
            return ["scalar", value.dtype.str, value.tobytes().hex()]
        return self._container(value)


class Decoder:
    """Decodes the values that an `Encoder` wrote into one message.

    Args:
        find: Returns the object for the number of a remote reference.
        exception: Returns the substitute of an exception class, from its number, module, name and bases.
        shared: The sender's `shared` containers.

    Only the types named in this module are instantiated, whatever the message holds. A message that no Encoder wrote
    may raise any exception.
    """

    TAGS = frozenset(
        "bytes container error exception frozenset iterator known remote scalar tuple type value view".split()
    )

    def __init__(self, find, exception=None, shared=()):
        self.find, self.exception = find, exception
        self.containers = dict(enumerate(shared))

    def __call__(self, data):
        if not isinstance(data, list):
            return data
        tag, *content = data
        if tag not in self.TAGS:
            raise ValueError(f"not a tag: {tag!r}")
        return getattr(self, f"_{tag}")(*content)

    def _each(self, items):
        return [self(item) for item in items]

    def _remote(self, ref):
        return self.find(ref)

    def _type(self, name):
        return TYPES[name]

    def _bytes(self, text):
        return bytes.fromhex(text)

    def _tuple(self, items):
        return tuple(self._each(items))

    def _frozenset(self, items):
        return frozenset(self._each(items))

    def _iterator(self, items):
        return iter(self._each(items))

    def _view(self, name, mapping):
        return {"keys": dict.keys, "values": dict.values, "items": dict.items}[name](self(mapping))

    def _value(self, name, args):
        kind = TYPES[name]
        if kind not in REDUCED:
            raise ValueError(f"not a value: {name}")
        return kind(*self._each(args))

    def _exception(self, ref, module, name, bases):
        return self.exception(ref, module, name, self._each(bases))

    def _error(self, kind, args, attributes, text):
        kind, args = self(kind), self._each(args)
        if not issubclass(kind, BaseException):
            raise TypeError(f"not an exception class: {kind}")
        try:
            error = kind(*args)
        except Exception:  # the constructor takes other arguments than those in `args`
            error = kind.__new__(kind)
            error.args = tuple(args)
        error.__dict__.update(self(attributes))
        if isinstance(error, RemoteException):
            error.__dict__["_text"] = text
        return error

    def _known(self, i):
        return self.containers[i]

    def _container(self, i, name, args, items):
        if name == "ndarray":
            shape, dtype = args
            value = importlib.import_module("numpy").empty(shape, dtype)
        elif TYPES[name] in CONTAINERS:
            value = TYPES[name](*self._each(args))
        else:
            raise ValueError(f"not a container: {name}")
        self.containers[i] = value
        self.fill(value, name, args, items)
        return value

    def fill(self, value, name, args, items):
        """Puts items in the form of `Encoder.contents` into an empty container or an array of that shape."""
        if name == "ndarray":
            if args[1] == "O":
                for place, item in zip(range(value.size), items, strict=True):
                    value.flat[place] = self(item)
            else:
                value[...] = self._flat(args[1], items[0]).reshape(value.shape)
        elif isinstance(value, dict):
            for key, item in items:
                value[self(key)] = self(item)
        elif isinstance(value, bytearray):
            value.extend(bytes.fromhex(items[0]))
        elif isinstance(value, set):
            value.update(self._each(items))
        else:
            value.extend(self._each(items))

    def refill(self, i, name, args, items):
        """Updates a shared container in place to the sender's content."""
        value = self.containers[i]
        same = [list(value.shape), value.dtype.str] == args if name == "ndarray" else isinstance(value, TYPES[name])
        if not same:
            raise ValueError(f"a {type(value).__name__} cannot become this {name}")
        if name == "array":
            del value[:]
        elif name != "ndarray":
            value.clear()
        self.fill(value, name, args, items)

    def _scalar(self, dtype, text):
        return self._flat(dtype, text)[0]

    def _flat(self, dtype, text):
        numpy = importlib.import_module("numpy")
        return numpy.frombuffer(bytes.fromhex(text), dtype) if text else numpy.empty(0, dtype)


def snapshots(containers, keep):
    """The content of each container as a string, to detect changes."""
    return [json.dumps(Encoder(keep, containers, consume=False).contents(container)) for container in containers]


def exception_class(ref, module, name, bases):
    """The judge's substitute for an exception class of the answer: the class itself if Python defines it.

    Raises:
        TypeError: If the bases are not those of an exception class.
    """
    if module.partition(".")[0] in sys.stdlib_module_names:
        own = getattr(sys.modules.get(module), name, None)
        if isinstance(own, type) and issubclass(own, BaseException):
            return own
    if not all(issubclass(base, BaseException) for base in bases):
        raise TypeError(f"not bases of an exception class: {bases}")
    if not any(issubclass(base, RemoteException) for base in bases):
        bases = [RemoteException, *bases]
    return type(printable(name), tuple(bases), {"_ref": ref})


def printable(text):
    """Text with surrogates and control characters escaped, safe for terminals and files."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
