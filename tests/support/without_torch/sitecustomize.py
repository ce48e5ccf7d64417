"""On PYTHONPATH: torch and scikit-learn are as good as not installed. MindFormers imports them where they are, which
takes seconds, and this project's training and prediction need neither."""
import sys

sys.modules.update({"torch": None, "sklearn": None})
