#!/.diskmorph/busybox sh
# The power button.
kill -PWR 1
