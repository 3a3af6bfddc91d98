"""Knowledge distillation for text, image and detection models: loss terms, signals, teachers, students and caches."""
