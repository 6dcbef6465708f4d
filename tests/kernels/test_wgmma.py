"""The search of machine code for registers that are written while a wgmma reads them."""

import pytest
from wgmma import overwritten

LOOP = """
.L_x_0:
        /*0100*/                   LDSM.16.M88.4 R100, [R116] ;
        /*0110*/                   WARPGROUP.ARRIVE ;
        /*0120*/                   HGMMA.64x128x16.F32.BF16 R24, R96, gdesc[UR8], R24 ;
        /*0130*/                   HGMMA.64x128x16.F32.BF16 R24, R100, gdesc[UR8], R24, gsb0 ;
        /*0140*/                   WARPGROUP.DEPBAR.LE gsb0, {pending} ;
        /*0150*/              @!P2 BRA `(.L_x_0) ;
        /*0160*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
"""


@pytest.mark.parametrize(
    ("change", "count"),
    [
        ({}, 1),  # the next round loads R100 while the last one's product reads it
        ({"{pending}": "0x0"}, 0),
        ({"R100, [R116]": "R104, [R116]"}, 0),
        ({"R100, [R116]": "R98, [R116]"}, 1),  # four registers, the last two of which are read
        ({"LDSM.16.M88.4 R100, [R116]": "STS.128 [R100], R8"}, 0),
        ({"R24, R96, gdesc": "R24, gdesc[UR4], gdesc", "R24, R100,": "R24, gdesc[UR6],"}, 0),
        ({"@!P2 BRA `(.L_x_0)": "NOP"}, 0),
    ],
)
def test_what_is_written_under_a_wgmma_is_found(change, count):
    code = LOOP
    for old, new in change.items():
        assert old in code
        code = code.replace(old, new)
    assert len(overwritten(code.replace("{pending}", "0x1"))) == count
