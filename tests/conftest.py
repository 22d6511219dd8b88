"""For all tests: the processes that they start hear a hangup, also where the tests themselves were started under nohup."""

import signal

signal.signal(signal.SIGHUP, signal.SIG_DFL)
