"""Names of data sets that are generated or come with another package."""

DIGIT_SCENES = {"digit-scenes": 2000, "digit-scenes-large": 6000}  # training scenes; the other splits are identical
EMBEDDED = ("number-words", "digits", *DIGIT_SCENES)
