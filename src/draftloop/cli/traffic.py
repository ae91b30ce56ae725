"""Traffic of one kind, for the demo and the learning benchmark: a quartermaster's log of a research ship.

Contract: `quartermaster_prompts(n)` gives the first n of 250 different prompts in a fixed order. They share
one system message that sets a form of answer which a stock draft guesses badly. Pure data.
"""

from __future__ import annotations

SYSTEM = (
    "You are Marlo, quartermaster of the research ship Petrel. Answer every question as an entry of the "
    "ship's log, in the first person plural, dry and short. Use exactly these lines: 'LOG ENTRY', "
    "then 'Situation:', 'Cause:', 'Remedy:', 'Watch for:', each with one sentence, and end with 'Fair winds, "
    "Marlo.'"
)

_GEAR = (
    "the bilge pump", "the anchor windlass", "the galley stove", "the steering chain", "the radar mast",
    "the fresh water tank", "the diesel generator", "the life raft", "the signal lamp", "the cargo winch",
    "the echo sounder", "the ballast valve", "the port engine", "the weather fax", "the galley refrigerator",
    "the compass housing", "the gangway", "the mooring winch", "the propeller shaft", "the ventilation fan",
    "the oil separator", "the masthead light", "the VHF radio", "the aft crane", "the sediment corer",
)  # fmt: skip
_MATTERS = (
    "fog in a narrow channel", "a crew that sleeps badly", "ice on the deck", "a shortage of coffee",
    "a torn sail on the workboat", "a stowaway cat", "seasick scientists", "a cracked sample jar",
    "a late supply boat", "a leaking porthole", "a quarrel about the watch list", "jellyfish in the intake",
    "a lost anchor buoy", "spoiled flour", "a drifting instrument mooring", "a strange smell in the hold",
    "a storm warning for tonight", "a sprained wrist", "a missing logbook page", "barnacles on the hull",
    "a dead battery in the tender", "water in the fuel", "an outdated chart", "a new cook",
    "a rat in the pantry",
)  # fmt: skip
_ABOUT_GEAR = (
    "Something is wrong with {}. What do we do?",
    "How should we look after {}?",
    "A passenger asks what {} is for. Answer him.",
    "Who should check {} before we leave port, and why?",
    "{} made a grinding noise last night. Report.",
)
_ABOUT_MATTERS = (
    "We have {}. What now?",
    "What does {} mean for tomorrow's work?",
    "How did other ships deal with {}?",
    "The captain asks about {}. Report to her.",
    "Is {} a reason to turn back?",
)


def quartermaster_prompts(count: int) -> list[str]:
    """The first `count` of 250 prompts, in an order that mixes subjects and questions.

    Raises:
        ValueError: there are no so many.
    """
    gear = [form.format(what) for form in _ABOUT_GEAR for what in _GEAR]
    matters = [form.format(what) for form in _ABOUT_MATTERS for what in _MATTERS]
    both = [prompt[0].upper() + prompt[1:] for pair in zip(gear, matters, strict=True) for prompt in pair]
    # 101 has no factor in common with 250, so every prompt comes once.
    mixed = [both[index * 101 % len(both)] for index in range(len(both))]
    if count > len(mixed):
        raise ValueError(f"{count} prompts were asked for, there are {len(mixed)}")
    return mixed[:count]
