"""Science questions from school, the hard ones: which answer is right?"""

from dataclasses import replace

from .arc_easy import TASK as ARC_EASY

TASK = replace(ARC_EASY, name="arc_challenge", title="ARC-Challenge", hub=("allenai/ai2_arc", "ARC-Challenge"))
