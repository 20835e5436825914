"""Counting instructions: loops by their turns, branches by the share that takes them, unknown shapes refused."""

import pytest
from speed.sass import Line, code, parse

LISTING = """
	.section	.text.kernel
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LOP3.LUT R2, R2, 0x8, RZ, 0xc0, !PT ;
        /*0020*/              @!P0 BRA `(.L_x_0) ;
        /*0030*/                   LDG.E R4, desc[UR4][R2.64] ;
        /*0040*/               @P1 FADD R4, R4, R4 ;
.L_x_0:
        /*0050*/               @P2 BRA `(.L_x_1) ;
        /*0060*/                   STG.E desc[UR4][R2.64], R4 ;
        /*0070*/                   EXIT ;
.L_x_2:
        /*0080*/                   BRA `(.L_x_2);
        /*0090*/                   NOP;
"""


def test_instructions_count_as_often_as_they_run():
    counted = code(parse(LISTING)).executed([10], [0.5])
    assert counted == {
        "control and other": 2 + 20,
        "integer": 10,
        "global load and store": 5 + 1,
        "float": 5,
    }


def test_loops_in_loops():
    lines = [
        Line("MOV", "L_x_0", None),
        Line("FADD", "L_x_1", None),
        Line("BRA", None, "L_x_1"),
        Line("BRA", None, "L_x_0"),
    ]
    assert code(lines).executed([3, 5], []) == {"integer": 3, "float": 15, "control and other": 18}


@pytest.mark.parametrize("at", [0, 3])
def test_branches_whose_share_is_unknown_are_refused(at):
    lines = [
        Line("FADD", None, None),
        Line("FADD", "L_x_0", None),
        Line("BRA", None, "L_x_0"),
        Line("EXIT", "L_x_1", None),
    ]
    lines.insert(at, Line("BRA", None, "L_x_1"))
    lines.append(Line("EXIT", "L_x_1", None))
    with pytest.raises(ValueError, match="outside the loops"):
        code(lines)


def test_a_way_out_ahead_of_the_loops_is_not_taken():
    lines = [
        Line("MOV", None, None),
        Line("BRA", None, "L_x_1"),
        Line("STG", None, None),
        Line("EXIT", None, None),
        Line("FADD", "L_x_1", None),
        Line("BRA", None, "L_x_1"),
    ]
    assert code(lines).executed([7], []) == {"integer": 1, "control and other": 1 + 7, "float": 7}


def test_numbers_of_loops_and_branches_must_match():
    with pytest.raises(ValueError, match="1 loops and 1 branches"):
        code(parse(LISTING)).executed([10, 2], [0.5])
