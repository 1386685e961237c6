"""Export to AWS: disks become EBS snapshots and AMIs, block by block, and come back.

Only this package and formats/remote/s3.py import boto3 (the extra diskmorph[aws]). Every call to AWS goes through
`session.Session.call`, everything that a job makes through `undo.Undo`, every block through `ebs`.
"""

from __future__ import annotations
