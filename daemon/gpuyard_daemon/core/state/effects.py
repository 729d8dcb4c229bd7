"""What follows from a turn's facts for the world outside: orders to nodes, notices to tenants.

Filled while facts are applied, and only there, so that applying a record again yields the same orders and notices.
"""

from __future__ import annotations

import msgspec

from gpuyard_daemon.core.state.model import Assignment, Job, Node
from gpuyard_daemon.core.state.turn import AnswerNotice, JobNotice, NodeOrders, Notice
from gpuyard_protocol.jobs import JobEvent, SubmissionAnswer, Why
from gpuyard_protocol.names import JobId, NodeId, Tenant
from gpuyard_protocol.nodes import Launch, Order, Resume, Start, Suspend


class Effects:
    """Orders by node, and notices, in the order in which they came about."""

    __slots__ = ("_first", "_fresh", "_notices", "_orders")

    def __init__(self) -> None:
        self._orders: dict[NodeId, list[Order]] = {}
        self._first: dict[NodeId, int] = {}
        self._notices: list[Notice | None] = []
        #: Where the notice "pending" of a job accepted in this turn stands: dropped if the job goes on at once.
        self._fresh: dict[JobId, int] = {}

    def order(self, node: Node, order: Order) -> None:
        """Number an order for a node."""
        node.orders_issued += 1
        orders = self._orders.get(node.id)
        if orders is None:
            self._first[node.id] = node.orders_issued
            self._orders[node.id] = [order]
        else:
            orders.append(order)

    def start(self, node: Node, job: Job, assignment: Assignment) -> None:
        """Number the order to start a replica."""
        self.order(node, start_order(job, assignment))

    def amend(self, node: Node, start: Start) -> None:
        """Put another order to start a replica in the place of the one that this turn has made."""
        orders = self._orders[node.id]
        orders[[order.key for order in orders].index(start.key)] = start

    def tell(self, job: Job, now_ms: int) -> None:
        """The job entered its present state."""
        fresh = self._fresh.pop(job.id, None)
        if fresh is not None:
            self._notices[fresh] = None
        self._notices.append(JobNotice(job.tenant, event_of(job, now_ms)))

    def warn(self, job: Job, why: Why, now_ms: int) -> None:
        """Something its owner should know; the job's state is as it was."""
        self._notices.append(JobNotice(job.tenant, msgspec.structs.replace(event_of(job, now_ms), reason=why)))

    def tell_fresh(self, job: Job, now_ms: int) -> None:
        """The job was accepted and waits; worth a notice only if it still waits at the end of the turn."""
        self._fresh[job.id] = len(self._notices)
        self._notices.append(JobNotice(job.tenant, event_of(job, now_ms)))

    def answer(self, tenant: Tenant, answer: SubmissionAnswer) -> None:
        self._notices.append(AnswerNotice(tenant, answer))

    def orders(self) -> tuple[NodeOrders, ...]:
        return tuple(
            NodeOrders(node=node, first=self._first[node], orders=tuple(orders))
            for node, orders in self._orders.items()
        )

    def notices(self) -> tuple[Notice, ...]:
        return tuple(notice for notice in self._notices if notice is not None)


class Forgone(Effects):
    """Of a record whose orders and notices have left long ago, as a replay knows: what remains are the numbers that
    nodes' orders have."""

    __slots__ = ()

    def order(self, node: Node, order: Order) -> None:
        node.orders_issued += 1

    def start(self, node: Node, job: Job, assignment: Assignment) -> None:
        node.orders_issued += 1

    def amend(self, node: Node, start: Start) -> None:
        pass

    def tell(self, job: Job, now_ms: int) -> None:
        pass

    def warn(self, job: Job, why: Why, now_ms: int) -> None:
        pass

    def tell_fresh(self, job: Job, now_ms: int) -> None:
        pass

    def answer(self, tenant: Tenant, answer: SubmissionAnswer) -> None:
        pass


def event_of(job: Job, now_ms: int) -> JobEvent:
    return JobEvent(
        job=job.id,
        state=job.state,
        at_ms=now_ms,
        submission_id=job.submission_id,
        attempt=job.attempt,
        nodes=tuple([a.node for a in job.assignments]) if job.state != "pending" else (),
        reason=job.why if job.verdict is None else job.verdict.why,
        exit_code=job.exit_code,
    )


def standing_order(assignment: Assignment) -> Suspend | Resume | None:
    """The newest of the orders to suspend or resume a replica."""
    if not assignment.step:
        return None
    if assignment.state in ("suspending", "suspended"):
        return Suspend(key=assignment.key, step=assignment.step)
    return Resume(key=assignment.key, step=assignment.step)


def start_order(job: Job, assignment: Assignment) -> Start:
    """The order that starts one replica; the same whenever it is asked for."""
    spec = job.spec
    return Start(
        key=assignment.key,
        partition=assignment.home or assignment.partition,
        launch=Launch(
            tenant=job.tenant,
            user=job.user,
            argv=spec.argv,
            script=spec.script,
            name=spec.name,
            env=spec.env,
            cwd=spec.cwd,
            replicas=len(job.assignments),
            cpu_milli=spec.need.cpu_milli,
            memory_mib=spec.need.memory_mib,
            cpu_limit_milli=spec.need.cpu_milli if spec.need.cpu_asked else 0,
            memory_limit_mib=spec.need.memory_mib if spec.need.memory_asked else 0,
            time_limit_ms=spec.time_limit_ms,
            stop_grace_ms=spec.stop_grace_ms,
            service=job.service,
            array_job=job.array,
            array_index=job.array_index,
            array_count=spec.array.count if job.array and spec.array else 0,
            lease_ms=assignment.lease_ms,
            suspendable=spec.preemption == "suspend",
            idle=spec.idle,
            image=spec.image,
            launcher=spec.launcher,
            upload=spec.upload,
            share_domain=spec.need.share_domain,
            secrets=spec.secrets,
            replicas_min=spec.min_replicas,
            replicas_max=job.most_replicas if spec.min_replicas else 0,
        ),
        hold=job.is_gang,
    )
