"""What `sdtpu plan --full` makes of Pallas kernels: the compiler writes their instructions, and a trace their steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdtpu_worker.planning.chips import CHIPS
from sdtpu_worker.planning.hlo import parse_module
from sdtpu_worker.planning.hlo_traffic import Traffic
from sdtpu_worker.planning.kernels import Bundles, KernelCycles, kernel_key, read_bundles

V5E = CHIPS["v5e"]
KEY = "convolution(bf16[1,64,64,512], f32[1,1,512])"
CALL = (
    "%convolution.7 = (bf16[1,64,64,512]{3,2,1,0:T(8,128)(2,1)S(1)}, f32[1,2,512]{2,1,0}) custom-call(%a, %b),"
    ' custom_call_target="tpu_custom_call",'
    " operand_layout_constraints={bf16[1,64,64,512]{3,2,1,0}, f32[1,1,512]{2,1,0}},"
    " frontend_attributes={kernel_metadata={}},"
    ' metadata={op_name="jit(local_tick)/decode/cond/branch_1_fun/convolution/pallas_call"}'
)
PROGRAM = f"""HloModule jit_f

ENTRY %main (a: bf16[1,64,64,512], b: f32[1,1,512]) -> (bf16[1,64,64,512], f32[1,2,512]) {{
  %a = bf16[1,64,64,512]{{3,2,1,0}} parameter(0)
  %b = f32[1,1,512]{{2,1,0}} parameter(1)
  ROOT {CALL}
}}
"""
MATMULS = [[512, 512, 512, 9 * 8]]
STEPS = {KEY: {"steps": 8, "matmuls": MATMULS, "matmuls_of_one_window": MATMULS}}
MATRIX_CYCLES = 9 * 8 * 2 * 512**3 / (V5E.flops / V5E.clock_hz)


def test_a_kernel_is_known_by_its_name_and_its_operands():
    assert kernel_key(CALL) == KEY
    assert kernel_key(CALL.replace("tpu_custom_call", "ConcatBitcast")) is None


@pytest.mark.parametrize(("bundles", "cycles"), [(30_000, 240_000), (100, int(MATRIX_CYCLES))])
def test_a_kernel_takes_its_bundles_in_each_step_or_what_the_matrix_unit_needs(bundles, cycles):
    program = parse_module(PROGRAM)
    work = Traffic(program, KernelCycles(STEPS, {KEY: Bundles(bundles, bundles)}, V5E)).total()
    assert (work.kernels, work.kernel_cycles, work.cycles) == (1, cycles, 0)


def test_before_code_is_generated_nothing_is_said_of_kernels():
    assert Traffic(parse_module(PROGRAM), KernelCycles(STEPS, {}, V5E)).total().kernel_cycles == 0


def test_bundles_are_read_from_what_the_compiler_wrote(tmp_path: Path):
    head = "Schedule analysis:\n\ttotal scheduled bundles:    16685\n\t16670.00 scheduled bundles (100.00%): "
    (tmp_path / "1-convolution.7-00-schedule-analysis_final_bundles.txt").write_text(head + CALL)
    (tmp_path / "1-fusion.1-00-schedule-analysis_final_bundles.txt").write_text(head + "%fusion.1 = f32[8] fusion(%x)")
    (tmp_path / "1-convolution.7-01-final_bundles.txt").write_text("bundles")
    assert read_bundles(tmp_path) == {KEY: Bundles(16685, 16685)}


OF_WINDOWS = CALL.replace("convolution", "fused_attention_of_windows")
KEY_OF_WINDOWS = KEY.replace("convolution", "fused_attention_of_windows")
INSTRUCTIONS = """= control target key start
     0   :  { %s5_s20 = sld [smem:[#allocation2]] } /* Start region 0 */
   0x9 LB: > { %s35_s0 = sadd.s32 1, %s70930_s11 } /* Start region 43 */
   0xf   : > { %s1_s14 = smov 0  ;;  %282 = sbr.rel (%p279_p3) target = $region48 } /* End region 45 */
  0x13 PF: > { %s3_s2 = sld [smem:[#allocation3]] } /* Start/End empty region 48 :: Start region 51 */
  0x1b   : > { %358 = sbr.rel (%p63549_p8) target = $region52 }
  0x20   : > { %400 = sbr.rel (%p9_p1) target = $region60 }
  0x30 PF: > { %450 = sbr.rel (!%p9_p1) target = $region64 } /* Start/End empty region 60 */
  0x40 PF: > { %v1_v1 = vadd.f32 %v0_v0, %v0_v0 } /* Start/End empty region 64 */
0x41b PF: > { %28613 = sbr.rel (%p355_p7) target = $region56 } /* Start/End empty region 52 :: Start region 54 */
0xc1b PF: > { %s26_s13 = sadd.s32 1, %s70938_s13 } /* Start/End empty region 56 */
 0xc20   :  { %25 = sbr.rel (!%p23_p9) target = $region89 }
"""


@pytest.mark.parametrize(
    ("instructions", "wanted"),
    [(INSTRUCTIONS, Bundles(3200 - 0x400, 3200 - 0x800)), ("", Bundles(3200, 3200)), (None, Bundles(3200, 3200))],
)
def test_of_a_kernel_with_code_for_one_window_and_for_all_either_counts(tmp_path: Path, instructions, wanted):
    head = "Schedule analysis:\n\ttotal scheduled bundles:    3200\n\t3195.00 scheduled bundles (100.00%): "
    (tmp_path / "1-fused_attention.7-00-schedule-analysis_final_bundles.txt").write_text(head + OF_WINDOWS)
    (tmp_path / "1-fused_attention.71-01-final_bundles.txt").write_text(INSTRUCTIONS.replace("0x41b", "0x51b"))
    if instructions is not None:
        (tmp_path / "1-fused_attention.7-01-final_bundles.txt").write_text(instructions)
    assert read_bundles(tmp_path) == {KEY_OF_WINDOWS: wanted}


def test_a_kernel_counts_with_one_window_in_a_step_and_with_all_beside_it():
    product = [512, 512, 512]
    facts = {"steps": 10, "matmuls": [[*product, 30]], "matmuls_of_one_window": [[*product, 10]]}
    few = KernelCycles({KEY_OF_WINDOWS: facts}, {KEY_OF_WINDOWS: Bundles(500_000, 200_000)}, V5E)
    assert [few(OF_WINDOWS, has_windows) for has_windows in (False, True)] == [2_000_000, 5_000_000]
    in_loops = KernelCycles({KEY_OF_WINDOWS: facts}, {KEY_OF_WINDOWS: Bundles(2, 1)}, V5E)
    least, most = (in_loops(OF_WINDOWS, has_windows) for has_windows in (False, True))
    assert least == pytest.approx(10 * 2 * 512**3 / (V5E.flops / V5E.clock_hz), abs=1)
    assert most == pytest.approx(3 * least, abs=3)
