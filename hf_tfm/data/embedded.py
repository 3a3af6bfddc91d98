"""Names of data sets that are generated or come with another package."""

DIGIT_SCENES = {"digit-scenes": 2000, "digit-scenes-large": 6000}  # training scenes; the other splits are identical
SPELLED_NUMBERS = ("spelled-numbers", "spelled-number-preferences", "spelled-number-rankings")
EMBEDDED = ("number-words", *SPELLED_NUMBERS, "digits", *DIGIT_SCENES)
