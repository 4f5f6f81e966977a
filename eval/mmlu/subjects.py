"""The 57 subjects of MMLU in their four groups, by the names that the lm-evaluation-harness gives them.

`mmlu` is all of them, `mmlu_stem` a group, `mmlu_anatomy` a subject.
"""

VERSION = 1.0  # of the harness's tasks

GROUPS = {"stem": "stem", "humanities": "humanities", "social_sciences": "social sciences", "other": "other"}
"""Each group's name, and what tables call it."""

SUBJECTS = {
    "abstract_algebra": "stem",
    "anatomy": "stem",
    "astronomy": "stem",
    "business_ethics": "other",
    "clinical_knowledge": "other",
    "college_biology": "stem",
    "college_chemistry": "stem",
    "college_computer_science": "stem",
    "college_mathematics": "stem",
    "college_medicine": "other",
    "college_physics": "stem",
    "computer_security": "stem",
    "conceptual_physics": "stem",
    "econometrics": "social_sciences",
    "electrical_engineering": "stem",
    "elementary_mathematics": "stem",
    "formal_logic": "humanities",
    "global_facts": "other",
    "high_school_biology": "stem",
    "high_school_chemistry": "stem",
    "high_school_computer_science": "stem",
    "high_school_european_history": "humanities",
    "high_school_geography": "social_sciences",
    "high_school_government_and_politics": "social_sciences",
    "high_school_macroeconomics": "social_sciences",
    "high_school_mathematics": "stem",
    "high_school_microeconomics": "social_sciences",
    "high_school_physics": "stem",
    "high_school_psychology": "social_sciences",
    "high_school_statistics": "stem",
    "high_school_us_history": "humanities",
    "high_school_world_history": "humanities",
    "human_aging": "other",
    "human_sexuality": "social_sciences",
    "international_law": "humanities",
    "jurisprudence": "humanities",
    "logical_fallacies": "humanities",
    "machine_learning": "stem",
    "management": "other",
    "marketing": "other",
    "medical_genetics": "other",
    "miscellaneous": "other",
    "moral_disputes": "humanities",
    "moral_scenarios": "humanities",
    "nutrition": "other",
    "philosophy": "humanities",
    "prehistory": "humanities",
    "professional_accounting": "other",
    "professional_law": "humanities",
    "professional_medicine": "other",
    "professional_psychology": "social_sciences",
    "public_relations": "social_sciences",
    "security_studies": "social_sciences",
    "sociology": "social_sciences",
    "us_foreign_policy": "social_sciences",
    "virology": "other",
    "world_religions": "humanities",
}
"""The group of each subject. Results and prompt files have them in this order, the alphabet's."""

NAMES = tuple(f"mmlu_{name}" for name in (*GROUPS, *SUBJECTS))
"""What can be asked for beside `mmlu`."""


def subjects_of(name: str) -> tuple[str, ...]:
    """The subjects that a name stands for.

    >>> subjects_of("mmlu_anatomy"), len(subjects_of("mmlu_stem")), len(subjects_of("mmlu"))
    (('anatomy',), 19, 57)
    """
    part = name.removeprefix("mmlu_")
    if part in SUBJECTS:
        return (part,)
    return tuple(subject for subject, group in SUBJECTS.items() if name == "mmlu" or group == part)
