"""Knowledge distillation: what a student is compared with, and how, for texts, images and detection alike."""
