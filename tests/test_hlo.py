"""Programs by their text: small ones, written by hand after what libtpu 0.0.52 prints."""

import pytest

from maejax.hlo import Module, group_size, shape_bytes

# A loop of 8 over a layer: its gradient (512, 2048) is reduced and scattered, 16 rows for each of 32 devices, inside a
# fused operation; a gather with channel 5 is spread over two fused operations of the loop but belongs to the entry.
PROGRAM = """\
HloModule jit_train_step, is_scheduled=true, num_partitions=32

%all-reduce-scatter.1 (input.1: bf16[512,2048]) -> bf16[16,2048] {
  %input.1 = bf16[512,2048]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-reduce.1 = bf16[512,2048]{1,0:T(8,128)(2,1)} all-reduce(%input.1), channel_id=6, replica_groups={{0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31}}, to_apply=%add
  ROOT %dynamic-slice.1 = bf16[16,2048]{1,0:T(8,128)(2,1)} dynamic-slice(%all-reduce.1), dynamic_slice_sizes={16,2048}
}

%async_collective_fusion.1 (p: f32[16,768]) -> f32[512,768] {
  %p = f32[16,768]{1,0:T(8,128)} parameter(0)
  ROOT %all-gather.2 = f32[512,768]{1,0:T(8,128)} all-gather(%p), channel_id=5, replica_groups=mesh['a'=32] {'a'}, dimensions={0}
}

%async_collective_fusion.2 (q: f32[16,768]) -> f32[512,768] {
  %q = f32[16,768]{1,0:T(8,128)} parameter(0)
  ROOT %all-gather.3 = f32[512,768]{1,0:T(8,128)} all-gather(%q), channel_id=5, replica_groups=mesh['a'=32] {'a'}, dimensions={0}
}

%add (x: bf16[], y: bf16[]) -> bf16[] {
  ROOT %sum = bf16[]{:T(256)} add(%x, %y), backend_config={"estimated_cycles":"999"}
}

%body (s: (s32[], bf16[512,2048])) -> (s32[], bf16[512,2048]) {
  %s = (s32[]{:T(128)}, bf16[512,2048]{1,0:T(8,128)(2,1)}) parameter(0)
  %fusion.1 = bf16[16,2048]{1,0:T(8,128)(2,1)} fusion(%s), kind=kCustom, calls=%all-reduce-scatter.1, backend_config={"estimated_cycles":"7"}
  %fusion.2 = (f32[512,768]{1,0:T(8,128)}, /*index=1*/u32[]{:S(2)}) fusion(%s), kind=kOutput, calls=%async_collective_fusion.1, backend_config={"estimated_cycles":"100"}
  ROOT %t = (s32[]{:T(128)}, bf16[512,2048]{1,0:T(8,128)(2,1)}) tuple(%s)
}

%condition (s: (s32[], bf16[512,2048])) -> pred[] {
  %limit = s32[]{:T(128)} constant(8)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  ROOT %less = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

ENTRY %main (a: f32[16,768], b: bf16[512,2048]) -> f32[512,768] {
  %a = f32[16,768]{1,0:T(8,128)} parameter(0)
  %fusion.3 = f32[512,768]{1,0:T(8,128)} fusion(%a), kind=kOutput, calls=%async_collective_fusion.2, backend_config={"estimated_cycles":"1000"}
  %while.1 = (s32[]{:T(128)}, bf16[512,2048]{1,0:T(8,128)(2,1)}) while(%a), condition=%condition, body=%body
  %all-reduce.9 = (f32[512]{0}, f32[]{:T(128)}) all-reduce(%a, %a), channel_id=7, replica_groups=[8,4]<=[32], to_apply=%add
  ROOT %permute = f32[512,768]{1,0:T(8,128)} collective-permute(%fusion.3), channel_id=8, source_target_pairs={{0,1},{1,0}}
}
"""  # noqa: E501


def test_cycles_count_loops_as_often_as_they_run():
    # 1000 once, (7 + 100) eight times; what the sum inside a collective or a fusion costs is not counted again.
    assert Module(PROGRAM).cycles() == 1000 + 8 * 107


KERNEL = """\
  %kernel.1 = bf16[16,2048]{1,0} custom-call(%s), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"bytes":"30","programs":"2"
}}, metadata={op_name="jit(f)/pallas_call"}, backend_config={"custom_call_config":{"body":"TUz"}}
"""  # noqa: E501


def test_kernels_say_themselves_what_they_cost():
    """As libtpu 0.0.42 prints them, their metadata on lines of its own; this one stands in a loop of eight."""
    assert Module(PROGRAM).kernels() == []
    text = PROGRAM.replace("  %fusion.2 =", KERNEL + "  %fusion.2 =")
    assert Module(text).kernels() == [{"bytes": 8 * 30, "programs": 8 * 2}]
    assert Module(text).cycles() == 1000 + 8 * 107
    with pytest.raises(ValueError, match="the kernel kernel.1 does not say what it costs"):
        Module(text.replace('"bytes":"30","programs":"2"\n', "")).kernels()


def test_collectives_count_once_each():
    found = {(c.kind, c.dtype, c.group, c.times): c.bytes for c in Module(PROGRAM).collectives()}
    assert found == {
        ("reduce-scatter", "bf16", 32, 8): 31 * 16 * 2048 * 2,  # a ring: 31 of 32 parts leave every device
        ("all-gather", "f32", 32, 1): 512 * 768 * 4 * 31 / 32,
        ("all-reduce", "f32", 4, 1): 2 * (512 + 1) * 4 * 3 / 4,
        ("collective-permute", "f32", 32, 1): 512 * 768 * 4,
    }


def test_reductions_of_unrolled_blocks_share_a_channel_and_count_each():
    computation = PROGRAM[PROGRAM.index("%all-reduce-scatter.1 (") : PROGRAM.index("%async_collective_fusion.1 (")]
    call = next(line for line in PROGRAM.splitlines() if "%fusion.1 = " in line)
    second = computation.replace("all-reduce-scatter.1", "all-reduce-scatter.2")
    text = PROGRAM.replace(computation, computation + second).replace(
        call, call + "\n" + call.replace("fusion.1", "fusion.9").replace("all-reduce-scatter.1", "all-reduce-scatter.2")
    )
    once, twice = (
        sum(c.bytes * c.times for c in Module(t).collectives() if c.kind == "reduce-scatter") for t in (PROGRAM, text)
    )
    assert twice == 2 * once


def test_a_loop_may_say_how_often_it_runs():
    text = PROGRAM.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"3"}}')
    assert Module(text).cycles() == 1000 + 3 * 107


def test_a_loop_of_unknown_length_is_no_guess():
    with pytest.raises(ValueError, match="the loop over condition does not say how often it runs"):
        Module(PROGRAM.replace("constant(8)", "parameter(0)"))


@pytest.mark.parametrize(
    "shape, started, size, dtype",
    [
        ("bf16[2,3]{1,0:T(8,128)(2,1)}", False, 12, "bf16"),
        ("(f32[4]{0}, s32[]{:T(128)})", False, 20, "f32"),
        ("pred[]", False, 1, "pred"),
        ("(bf16[2]{0}, bf16[64]{0}, u32[]{:S(2)}, u32[])", True, 128, "bf16"),  # operand, result, context
        ("((f32[2], f32[3]), (f32[20], f32[30]))", True, 200, "f32"),
    ],
)
def test_bytes_of_shapes(shape, started, size, dtype):
    assert shape_bytes(shape, started=started) == (size, dtype)


@pytest.mark.parametrize(
    "groups, size",
    [
        ("replica_groups={{0,1,2},{3,4,5}}", 3),
        ("replica_groups=[16,2]<=[32]", 2),
        ("replica_groups=mesh['a'=2,'b'=4,'c'=4] {'a','c'}", 8),
        ("replica_groups={}", 32),
    ],
)
def test_groups(groups, size):
    assert group_size(f"%x = f32[1] all-reduce(%y), {groups}, to_apply=%add", 32) == size
