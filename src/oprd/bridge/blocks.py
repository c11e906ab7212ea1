"""Which blocks of the two models are compared."""

import math


def partner(block: int, student_blocks: int, teacher_blocks: int) -> int:
    """The teacher's block at the relative depth of the student's `block`, both counted from 1. arXiv 2606.06021 [paper].

    round((l - 1) / (L_S - 1) * (L_T - 1)) + 1, halves up; the only block of a student goes with the teacher's last.
    """
    if student_blocks == 1:
        return teacher_blocks
    return math.floor((block - 1) * (teacher_blocks - 1) / (student_blocks - 1) + 0.5) + 1
