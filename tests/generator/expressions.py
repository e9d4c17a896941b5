"""Random maths on the state f32[B, T, W]: every case gives a value of the same type.

Values stay within a few units and no case magnifies a difference by more than about 10, so that
the rounding of a whole module stays bounded.
"""

from __future__ import annotations

from collections.abc import Callable

from liquidc.ir import DType, TensorType, Value, ops
from liquidc.ir.quantised import Codes, Scales, Zeros
from tests.generator.build import WIDTH, Builder

Case = Callable[[Builder, Value], Value]

BOUNDED = (ops.Neg, ops.Tanh, ops.Sigmoid, ops.ReLU, ops.SiLU, ops.Sin, ops.Cos)
COMPARE = (ops.Eq, ops.Ne, ops.Lt, ops.Le, ops.Gt, ops.Ge)
HALF = WIDTH // 2


def expression(b: Builder, x: Value, depth: int) -> Value:
    """`depth` random cases, one on top of the other."""
    for _ in range(depth):
        x = b.rng.choice(CASES)(b, x)
        if b.chance(10):
            b.rng.choice(CASES)(b, x)  # nobody uses it
    return x


def unary(b: Builder, x: Value) -> Value:
    return b.add(b.rng.choice(BOUNDED)(x))


def gelu(b: Builder, x: Value) -> Value:
    return b.add(ops.GELU(x, approximate=b.rng.choice(("none", "tanh"))))


def roots(b: Builder, x: Value) -> Value:
    small = b.add(ops.Sigmoid(b.add(ops.Tanh(x))))  # 0.27 … 0.73
    root = b.add(b.rng.choice((ops.Sqrt, ops.Rsqrt))(small))
    return b.add(ops.Sub(b.add(ops.Exp(small)), root))


def shared(b: Builder, x: Value) -> Value:
    """The same op twice, and sums and products of both."""
    kind = b.rng.choice(BOUNDED)
    first, second = b.add(kind(x)), b.add(kind(x))
    extreme = b.add(b.rng.choice((ops.Maximum, ops.Minimum))(second, x))
    return b.add(ops.Tanh(b.add(b.rng.choice((ops.Add, ops.Sub, ops.Mul))(first, extreme))))


def turned(b: Builder, x: Value) -> Value:
    """One op on its operands in both orders."""
    other = b.add(ops.Tanh(x))
    first, second = b.add(ops.Sub(x, other)), b.add(ops.Sub(other, x))
    return b.add(ops.Add(b.add(ops.SiLU(first)), b.add(ops.Sigmoid(second))))


def steps(b: Builder, x: Value) -> Value:
    """A logarithm, and a floor whose argument stays away from whole numbers."""
    small = b.add(ops.Sigmoid(b.add(ops.Tanh(x))))
    whole = b.add(ops.Floor(b.add(ops.Add(small, b.scalar(1.0)))))
    return b.add(ops.Mul(b.add(ops.Add(x, b.add(ops.Log(small)))), whole))


def quotient(b: Builder, x: Value) -> Value:
    divisor = b.add(ops.Add(b.add(ops.Sigmoid(x)), b.scalar(1.0)))
    return b.add(ops.Div(x, divisor))


def choice(b: Builder, x: Value) -> Value:
    """Comparisons, logic, selection."""
    other = b.add(ops.Neg(x))
    first, second = b.rng.choice(COMPARE), b.rng.choice(COMPARE)
    near, far = b.add(first(x, other)), b.add(second(x, b.scalar(0.5)))
    mask = b.add(b.rng.choice((ops.And, ops.Or))(b.add(ops.Not(near)), far))
    if b.chance(30):
        mask = b.add(ops.Broadcast(b.scalar(b.chance(50), DType.BOOL), shape=x.shape))
    some = b.add(ops.Any(mask, dims=(2,), keep=True))
    return b.add(ops.Where(b.add(ops.And(mask, some)), x, other))


def neutral(b: Builder, x: Value) -> Value:
    """An op that changes nothing, or nearly nothing."""
    kind, number = b.rng.choice(
        ((ops.Mul, 1.0), (ops.Div, 1.0), (ops.Sub, 0.0), (ops.Add, 0.0), (ops.Sub, -0.0))
    )
    constant = b.scalar(number)
    return b.add(
        kind(x, b.add(ops.Broadcast(constant, shape=x.shape)) if b.chance(50) else constant)
    )


def known(b: Builder, x: Value) -> Value:
    """Ops on constants."""
    vector = TensorType(DType.F32, (WIDTH,))
    a, c = (
        b.add(ops.Constant(value=tuple(map(float, numbers)), result_types=[vector]))
        for numbers in (b.rng.choices((-1.5, -0.0, 0.0, 0.25, 1.0), k=WIDTH) for _ in range(2))
    )
    a = b.add(b.rng.choice((ops.Add, ops.Sub, ops.Mul))(a, c))
    return b.add(b.rng.choice((ops.Add, ops.Mul))(b.add(ops.Tanh(x)), b.add(ops.Tanh(a))))


def repeated(b: Builder, x: Value) -> Value:
    """A number in the shape of the state."""
    number = b.rng.choice((0.0, 0.5, 1.0, 2.0))
    full = b.add(ops.Broadcast(b.scalar(number), shape=x.shape))
    return b.add(ops.Mul(b.add(ops.Tanh(x)), full))


def norm(b: Builder, x: Value) -> Value:
    return b.norm(x)


def chain(b: Builder, x: Value) -> Value:
    """Projections one after the other."""
    hidden = b.add(b.rng.choice(BOUNDED)(b.linear(x, b.rng.choice((5, 12)))))
    return b.linear(hidden, WIDTH)


def siblings(b: Builder, x: Value) -> Value:
    """Projections of one operand."""
    a, c = b.linear(x, WIDTH), b.linear(x, WIDTH)
    return b.add(ops.Tanh(b.add(b.rng.choice((ops.Mul, ops.Sub))(a, c))))


def heads(b: Builder, x: Value) -> Value:
    """Shapes: split, permuted, multiplied, put back."""
    x4 = b.reshape(b.reshape(x, "B", "T", 1, WIDTH), "B", "T", 2, HALF)
    x4 = b.add(ops.MatMul(x4, b.weight(HALF, HALF)))
    turned = b.add(ops.Transpose(x4, perm=(0, 1, 3, 2)))
    if b.chance(50):
        turned = b.add(ops.AssumeSizes(b.add(ops.Tanh(turned)), shape=turned.shape))
    return b.reshape(b.add(ops.Transpose(turned, perm=(0, 1, 3, 2))), "B", "T", WIDTH)


def halves(b: Builder, x: Value) -> Value:
    low = b.add(ops.Slice(x, dim=2, start=0, stop=HALF))
    high = b.add(ops.Slice(x, dim=2, start=HALF, stop=WIDTH))
    return b.add(ops.Concat([b.add(ops.Tanh(high)), low], dim=2))


def layout(b: Builder, x: Value) -> Value:
    """A projection by a weight whose layout is changed in the program."""
    weight = b.add(ops.Transpose(b.weight(WIDTH, WIDTH), perm=(1, 0)))
    top = b.add(ops.Slice(weight, dim=0, start=0, stop=HALF))
    weight = b.add(ops.Concat([top, b.weight(HALF, WIDTH)], dim=0))
    return b.add(ops.Linear(x, weight))


def quantised(b: Builder, x: Value) -> Value:
    """A projection by a weight of few bits."""
    format = b.rng.choice(("int4", "int8", "e4m3"))
    symmetric = format == "e4m3" or b.chance(50)
    kinds = (Codes, Scales) if symmetric else (Codes, Scales, Zeros)
    stored = b.stored(WIDTH, WIDTH)
    parts = [
        b.declared(f"{stored.name}.{kind.__name__.lower()}", kind(stored, format, HALF, symmetric))
        for kind in kinds
    ]
    weight = b.add(ops.Dequantize(*parts, format=format))
    rounded = HALF if b.chance(50) else 0
    return b.add(ops.Tanh(b.add(ops.Linear(x, weight, input_block=rounded))))


def picked(b: Builder, x: Value) -> Value:
    places = tuple(b.rng.randrange(WIDTH) for _ in range(WIDTH))
    index = b.add(ops.Constant(value=places, result_types=[TensorType(DType.I64, (WIDTH,))]))
    return b.add(ops.Gather(x, index, dim=2))


def reduced(b: Builder, x: Value) -> Value:
    """One number for each token."""
    kind = b.rng.choice((ops.Sum, ops.Mean, ops.Max))
    x4 = b.reshape(b.add(ops.Tanh(x)), "B", "T", 2, HALF)
    some = b.add(kind(x4, dims=(2, 3), keep=False))
    return b.add(ops.Mul(b.add(ops.Tanh(x)), b.reshape(some, "B", "T", 1)))


def shares(b: Builder, x: Value) -> Value:
    share = b.add(ops.Softmax(x, dim=2))
    return b.add(ops.CumSum(share, dim=2)) if b.chance(50) else share


def narrow(b: Builder, x: Value) -> Value:
    """Through another element type and back."""
    to = b.rng.choice((DType.F64, DType.BF16, DType.F32))
    return b.add(ops.Cast(b.add(ops.Tanh(b.add(ops.Cast(x, to=to)))), to=DType.F32))


def sized(b: Builder, x: Value) -> Value:
    """The number of tokens as a number."""
    count = b.add(ops.Cast(b.add(ops.Size(dim="T")), to=DType.F32))
    return b.add(ops.Div(x, count))


def across(b: Builder, x: Value) -> Value:
    """Maths across the tokens of a row, which no pass may take apart."""
    if b.chance(50):
        total = b.add(ops.CumSum(b.add(ops.Tanh(x)), dim=1))
        return b.add(ops.Div(total, b.add(ops.Cast(b.add(ops.Size(dim="T")), to=DType.F32))))
    highest = b.add(ops.Max(x, dims=(1,), keep=True))
    return b.add(ops.Sub(x, highest))


CASES: tuple[Case, ...] = (
    unary,
    gelu,
    roots,
    shared,
    turned,
    quotient,
    steps,
    choice,
    neutral,
    known,
    repeated,
    norm,
    chain,
    siblings,
    heads,
    halves,
    layout,
    quantised,
    picked,
    reduced,
    shares,
    narrow,
    sized,
    across,
)
