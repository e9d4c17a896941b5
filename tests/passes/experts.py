"""IR text of expert regions as the trace writes them, for the tests of the expert passes."""

from __future__ import annotations

OUTPUT = """
    %h{e} = linear %x, %{w} : f32[B, T, 4]
    %s{e} = silu %h{e} : f32[B, T, 4]
    %o{e} = mul %s{e}, %r{e} : f32[B, T, 4]"""
INPUT = """
    %i{e} = mul %x, %r{e} : f32[B, T, 4]
    %h{e} = linear %i{e}, %{w} : f32[B, T, 4]
    %o{e} = silu %h{e} : f32[B, T, 4]"""


def region(
    e: int, total: str, body: str = OUTPUT, *, weight: str = "", skip: str = "", expert: int = -1
) -> str:
    """One expert's region, adding to %`total` and defining %y`e`."""
    w = weight or f"w{e}"
    used = e if expert < 0 else expert
    return f"""
  %m{e} = expert_mask %index, expert={used} : bool[B, T]
  %a{e} = any %m{e}, dims=[0, 1] : bool[]
  %y{e} = if %a{e}, role="expert", layer=0, expert={used} : f32[B, T, 4] {{
    %v{e} = expert_weight %index, %share, expert={used} : f32[B, T]
    %r{e} = reshape %v{e}, shape=["B", "T", 1] : f32[B, T, 1]
    %{w} = weight weight="{w}" : f32[4, 4]{body.format(e=e, w=w)}
    %k{e} = reshape %m{e}, shape=["B", "T", 1] : bool[B, T, 1]
    %z{e} = constant value=[0.0] : f32[]
    %n{e} = where %k{e}, %o{e}, %z{e} : f32[B, T, 4]
    %t{e} = add %{total}, %n{e} : f32[B, T, 4]
    yield %t{e}
  }} else {{
    yield %{skip or total}
  }}"""


def chain(*regions: str, count: int = 3, start: float = 0.0, result: str = "") -> str:
    """A function over the regions, which add to %total; returns the last one's result."""
    weights = "".join(
        f'weight @w{e} : f32[4, 4] = select(tensor("w", f32[{count}, 4, 4]), {e})\n'
        for e in range(count)
    )
    return f"""
module @m
{weights}
func @f(%x: f32[B, T, 4], %index: i64[B, T, 2], %share: f32[B, T, 2]) -> (y: f32[B, T, 4]) {{
  %zero = constant value=[{start}] : f32[]
  %total = broadcast %zero, shape=["B", "T", 4] : f32[B, T, 4]{"".join(regions)}
  return %{result or f"y{len(regions) - 1}"}
}}
"""
