"""The count of clocks in a loop of machine code."""

import pytest
from clocks import clocks, inner_loop

LOOP = """
.L_x_0:
        /*0010*/                   MUFU.EX2 R1, R1 ;
.L_x_1:
        /*0100*/                   LDSM.16.M88.4 R100, [R116] ;
        /*0110*/                   WARPGROUP.ARRIVE ;
        /*0120*/                   HGMMA.64x64x16.F32.BF16 R24, R96, gdesc[UR8], R24 ;
        /*0130*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR6], gdesc[UR8], R24, gsb0 ;
        /*0140*/                   MUFU.EX2 R7, R8 ;
        /*0150*/               @P0 FMNMX R9, R8, R7, !PT ;
        /*0160*/                   STS.128 [R4], R8 ;
        /*0170*/              @!P2 BRA `(.L_x_1) ;
        /*0180*/              @!P3 BRA `(.L_x_0) ;
"""


def test_clocks_by_hand():
    """Of 4 warps and 4,096 scores a round: 8 instructions a warp; 128 exponentials; two products of
    64 x 64 x 16; 16 bytes a lane read and stored, and what the products read."""
    assert len(inner_loop(LOOP)) == 8
    assert clocks(LOOP, 4, 4096) == {
        "issue": 8, "exponentials": 8, "integers": 2, "tensor": 64,
        "shared": (128 * 16 + 128 * 16 + 2 * 64 * 32 + 2048) // 128,
    }  # fmt: skip
    assert clocks(LOOP, 8, 4096)["tensor"] == clocks(LOOP, 4, 2048)["tensor"] == 128


@pytest.mark.parametrize("without", ["HGMMA", "BRA"])
def test_nothing_is_counted_where_no_loop_has_products(without):
    assert clocks(LOOP.replace(without, "NOP"), 4, 4096) == {}
