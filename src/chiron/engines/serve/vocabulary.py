"""The words of emulated engines; each is one token, and its place here is the token's id."""

from __future__ import annotations

_TEXT = (
    "a about after all also and any as at back because been before but by can come could day do down each end "
    "even few first for from get give go good great hand has have he her here high him his home how I if in into "
    "is it its just keep know large last left life like line little long look made make man many may me more most "
    "much must my never new next night no not now number of off old on one only open or other our out over own "
    "part people place point right said same saw say see set she side small so some still such take tell than "
    "that the their them then there these they thing think this time to together too turn two under until up us "
    "use very want was water way we well went were what when where which while who why will with word work world "
    "would year you your"
)
WORDS = tuple(_TEXT.split())
