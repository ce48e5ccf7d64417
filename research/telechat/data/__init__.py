"""From files of conversations to a MindRecord data set."""
