/*
 * The delivery protocol: workers carry batches of events from PostgreSQL to
 * ClickHouse. Between any two steps a fault can happen: workers die or lose their
 * leases, servers die, responses are lost, inserts begin late, and PostgreSQL fails over
 * to a replica that lacks the last commits. docs/delivery.md describes the result.
 * model_test.go runs the model and its mutants, which lack one safeguard each.
 *
 * The checker visits every order of steps within the model's bounds. It checks that
 *   - no event gets a second row in ClickHouse,
 *   - no event leaves the outbox without its row, unless it is a dead letter,
 *   - a dead letter has no row, and ClickHouse has refused it. If an operator mends the
 *     cause, a late insert may store the row,
 *   - nothing gets stuck: in the end the outbox is empty.
 *
 * A transaction in PostgreSQL is one step. A worker that dies loses its lease. A
 * worker that is cut off loses its lease and does not know it. It continues to send,
 * and fails at its next transaction.
 *
 * ClickHouse executes an insert partition by partition. LAYOUT says which events share
 * a partition. For each partition ClickHouse looks the token up and
 * remembers it in one step, and stores the rows in another step. An insert can end
 * between any two steps. An insert that was sent begins at any later time, even if its
 * sender has died. Nobody can see an insert before it begins.
 *
 * On a cluster (REPLICATED) the commit in Keeper stores the rows of a partition together
 * with the token. If Keeper fails during the commit, ClickHouse does not know the outcome.
 * One replica then shows the rows, and removes them later if they were not committed.
 *
 * The model assumes, and does not check:
 *   - a token does not leave the window while an insert under it is in flight, or
 *     while a worker that is cut off may still begin such an insert,
 *   - after a failover no worker sends before the inserts of the old primary's
 *     workers have ended,
 *   - ClickHouse refuses invalid data at every attempt, before it stores any row of
 *     the insert. It names the data of POISON as the cause, but not that of SOUR. With
 *     OPERATOR, it accepts the data of SOUR from some time on,
 *   - a presence check sees the rows of every insert that has ended,
 *   - a cluster has removed rows that were not committed before it forgets the token,
 *     before the relay counts their attempt as old, and before a failover.
 *
 * The numbers of tokens, batches and inserts are used again when they become free. A
 * token that nobody holds is as good as a new token.
 */

#ifndef FAULTS
#define FAULTS 2
#endif
#ifndef POISON
#define POISON 0 /* the events that ClickHouse refuses, one bit each */
#endif
#ifndef FAILOVERS
#define FAILOVERS 0
#endif
#ifndef SUSPECT
#define SUSPECT 0 /* whether workers may suspect the data of a batch whose insert failed */
#endif
#ifndef SOUR
#define SOUR 0 /* the events whose inserts fail without a cause, one bit each */
#endif
#ifndef OPERATOR
#define OPERATOR 0 /* whether an operator mends the cause of SOUR, and requeues dead letters */
#endif
#ifndef LAYOUT
#define LAYOUT 0
#endif
#if OPERATOR
#define MENDABLE SOUR
#else
#define MENDABLE 0
#endif

#if LAYOUT == 0 /* two events in two partitions */
#define EVENTS 2
#define EVENTS_IN(p) BIT(p)
#define PARTITIONS_OF(events) (events)
#endif
#if LAYOUT == 1 /* two events in one partition */
#define EVENTS 2
#define EVENTS_IN(p) ((p) == 0 -> 3 : 0)
#define PARTITIONS_OF(events) ((events) -> 1 : 0)
#endif
#if LAYOUT == 2 /* the events 0 and 1 in a partition, and the event 2 in another */
#define EVENTS 3
#define EVENTS_IN(p) ((p) == 0 -> 3 : 4)
#define PARTITIONS_OF(events) (((events) & 3 -> 1 : 0) | ((events) & 4 -> 2 : 0))
#endif

#ifdef REPLICATED
#define CLUSTER true
#else
#define CLUSTER false
#endif

#define WORKERS 2
#define BATCHES EVENTS
#define PARTITIONS 2
#define INSERTS 4
#define TOKENS 8
#define NOBODY 7 /* instead of the number of a worker or of a partition */

#define BIT(n) (1 << (n))
#define ALL (BIT(EVENTS) - 1)
#if EVENTS == 3
#define LATE 0 /* three events are committed at the start, so that the search ends in minutes */
#else
#define LATE ALL
#endif
#define SINGLE(events) ((events) == 1 || (events) == 2 || (events) == 4)
#define PARTITION(p, events) (PARTITIONS_OF(events) & BIT(p) -> EVENTS_IN(p) : 0)
#define EVENTS_BESIDE(events) (PARTITION(0, events) | PARTITION(1, events)) /* all events of their partitions */

/* PostgreSQL */
byte uncommitted = LATE; /* events of open transactions */
byte waiting = ALL & ~LATE; /* events in the outbox */
byte dead = 0;          /* events among the dead letters */
byte kept[EVENTS];      /* the token of each dead letter */
byte sour = SOUR;       /* the events of SOUR until an operator mends the cause */
byte requeued = 0;      /* events that an operator has requeued */
byte unverified = 0;    /* events in the outbox when the history changed */
byte lost = 0;          /* tokens of a lost history, under which inserts may still run */

typedef Batch {
	byte members; /* 0: the batch does not exist */
	byte token;
	bool attempted; /* a claim was committed under this token */
	bool reattempted; /* at least two claims were committed under it */
	bool forgotten; /* ClickHouse may have forgotten the token */
	byte holder
}
Batch batch[BATCHES];

/* ClickHouse */
byte rows = 0; /* events that are stored */
byte known[PARTITIONS]; /* the tokens that each partition remembers */
byte ghosts = 0; /* events whose rows a replica shows without a commit in Keeper */
byte ghost[PARTITIONS]; /* the tokens of these rows */
#define VISIBLE (rows | ghosts)

mtype = { free, travelling, running };
typedef Insert {
	mtype state = free;
	byte token;
	byte carried;
	byte todo; /* partitions that it has not reached */
	byte placing; /* the partition whose rows it is storing, or NOBODY */
	byte client /* the worker that waits for the response, or NOBODY */
}
Insert insert[INSERTS];

mtype = { none, accepted, failed, refused };
mtype response[WORKERS] = none;
byte hand[WORKERS]; /* the token that each worker may send under, as a bit */

byte faults = FAULTS;
byte failovers = FAILOVERS;

#if EVENTS == 3
#define IN_BATCHES (batch[0].members | batch[1].members | batch[2].members)
#define FREE_BATCH (!batch[0].members || !batch[1].members || !batch[2].members)
#define BATCH_TOKENS (BATCH_TOKEN(0) | BATCH_TOKEN(1) | BATCH_TOKEN(2) | KEPT_TOKEN(0) | KEPT_TOKEN(1) | KEPT_TOKEN(2))
#else
#define IN_BATCHES (batch[0].members | batch[1].members)
#define FREE_BATCH (!batch[0].members || !batch[1].members)
#define BATCH_TOKENS (BATCH_TOKEN(0) | BATCH_TOKEN(1) | KEPT_TOKEN(0) | KEPT_TOKEN(1))
#endif
#define UNCUT (waiting & ~IN_BATCHES)
#define EXECUTED(i, t) (insert[i].state == running && insert[i].token == t)
#define RUNNING(t) (EXECUTED(0, t) || EXECUTED(1, t) || EXECUTED(2, t) || EXECUTED(3, t))

/* The tokens of batches and dead letters, and of inserts that are in flight or may soon be. */
#define BATCH_TOKEN(n) (batch[n].members -> BIT(batch[n].token) : 0)
#define KEPT_TOKEN(e) ((dead & BIT(e) & MENDABLE) -> BIT(kept[e]) : 0)
#define IN_FLIGHT(n) (insert[n].state != free -> BIT(insert[n].token) : 0)
#define IN_USE (IN_FLIGHT(0) | IN_FLIGHT(1) | IN_FLIGHT(2) | IN_FLIGHT(3) | hand[0] | hand[1])

/* tidy forgets the tokens that are no longer used. */
inline tidy() {
	live = IN_USE;
	lost = lost & live;
	live = live | BATCH_TOKENS;
	known[0] = known[0] & live; known[1] = known[1] & live;
	live = 0
}

/* draw sets fresh to an unused token. */
inline draw() {
	live = IN_USE | BATCH_TOKENS;
	fresh = (!(live & 1) -> 0 : (!(live & 2) -> 1 : (!(live & 4) -> 2 : (!(live & 8) -> 3 :
		(!(live & 16) -> 4 : (!(live & 32) -> 5 : (!(live & 64) -> 6 : 7)))))));
	assert(!(live & BIT(fresh)));
	live = 0
}

#define FREE_PLACE (batch[0].members == 0 -> 0 : (batch[1].members == 0 -> 1 : BATCHES - 1))

/* write writes a batch of these events in a free place. */
inline write(events, first) {
	k = FREE_PLACE;
	assert(batch[k].members == 0);
	draw();
	batch[k].members = events; batch[k].token = fresh; batch[k].attempted = !(first);
	batch[k].reattempted = false; batch[k].forgotten = false; batch[k].holder = NOBODY;
	k = 0; fresh = 0
}

inline erase(n) {
	batch[n].members = 0; batch[n].token = 0; batch[n].attempted = false; batch[n].reattempted = false; batch[n].forgotten = false; batch[n].holder = 0
}

inline endInsert(n, what) {
	if
	:: insert[n].client != NOBODY -> response[insert[n].client] = what
	:: else
	fi;
	insert[n].state = free; insert[n].token = 0; insert[n].carried = 0; insert[n].todo = 0;
	insert[n].placing = 0; insert[n].client = 0;
	tidy()
}

/* detach lets the insert of the worker, if any, continue without the worker. */
inline detach(worker) {
	k = 0;
	do
	:: k < INSERTS ->
		if
		:: insert[k].state != free && insert[k].client == worker -> insert[k].client = NOBODY
		:: else
		fi;
		k++
	:: else -> break
	od;
	k = 0
}

/* The transactions of publishers commit in any order, at any time. */
active proctype Publishers() {
end:
	do
	:: d_step { uncommitted & 1 -> uncommitted = uncommitted & ~1; waiting = waiting | 1 }
	:: d_step { uncommitted & 2 -> uncommitted = uncommitted & ~2; waiting = waiting | 2 }
#if EVENTS == 3
	:: d_step { uncommitted & 4 -> uncommitted = uncommitted & ~4; waiting = waiting | 4 }
#endif
	od
}

/* Faults of ClickHouse, sessions and PostgreSQL. */
active proctype Faults() {
	byte k, n, live;
end:
	do
	:: atomic { /* ClickHouse dies and starts again */
		faults && (insert[0].state == running || insert[1].state == running ||
			insert[2].state == running || insert[3].state == running) ->
		faults--;
		n = 0;
		do
		:: n < INSERTS ->
			if
			:: insert[n].state == running -> endInsert(n, failed)
			:: else
			fi;
			n++
		:: else -> break
		od;
		n = 0 }
	:: atomic { /* a token leaves the window */
		faults && (known[0] | known[1]) ->
		n = 0;
		do
		:: n < TOKENS - 1 -> n++
		:: break
		od;
		if
		:: ((known[0] | known[1]) & ~IN_USE & BIT(n)) && !((ghosts & EVENTS_IN(0)) && ghost[0] == n) && !((ghosts & EVENTS_IN(1)) && ghost[1] == n) ->
			faults--;
			known[0] = known[0] & ~BIT(n); known[1] = known[1] & ~BIT(n);
			if
			:: CLUSTER && batch[0].members && batch[0].token == n -> batch[0].forgotten = true
			:: CLUSTER && batch[1].members && batch[1].token == n -> batch[1].forgotten = true
			:: else
			fi
		:: else
		fi;
		n = 0 }
	:: atomic { /* a session ends, and its worker does not know yet */
		faults && batch[0].members && batch[0].holder != NOBODY -> faults--; batch[0].holder = NOBODY }
	:: atomic {
		faults && batch[1].members && batch[1].holder != NOBODY -> faults--; batch[1].holder = NOBODY }
#if EVENTS == 3
	:: atomic {
		faults && batch[2].members && batch[2].holder != NOBODY -> faults--; batch[2].holder = NOBODY }
#endif
	:: atomic { /* PostgreSQL fails over: any of its last commits may be lost, except the commits of publishers */
		failovers ->
		failovers--;
		n = 0;
		do
		:: n < BATCHES ->
			if
			:: batch[n].members -> lost = lost | BIT(batch[n].token); erase(n) /* the cut is lost */
			:: batch[n].members -> batch[n].attempted = false; batch[n].reattempted = false; batch[n].holder = NOBODY /* the attempts are lost */
			:: batch[n].members -> batch[n].holder = NOBODY
			:: else
			fi;
			n++
		:: else -> break
		od;
		n = 0;
		if /* the settlement may be lost */
		:: rows & 1 -> waiting = waiting | 1
		:: true
		fi;
		if
		:: rows & 2 -> waiting = waiting | 2
		:: true
		fi;
#if EVENTS == 3
		if
		:: rows & 4 -> waiting = waiting | 4
		:: true
		fi;
#endif
		/* The tokens that workers may still send under are lost, too. */
		lost = lost | hand[0] | hand[1];
		/* The next cut notices the failover, and marks all events as unverified. */
#ifndef MUTANT_TRUST_A_FAILOVER
		unverified = waiting;
		batch[0].attempted = (batch[0].members != 0); batch[1].attempted = (batch[1].members != 0);
#if EVENTS == 3
		batch[2].attempted = (batch[2].members != 0);
#endif
#endif
		tidy() }
	od
}

/* store stores the rows of an insert in a partition. */
inline store(partition) {
	assert(!(rows & insert[me].carried & EVENTS_IN(partition))); /* doubled */
	assert(!(dead & insert[me].carried & EVENTS_IN(partition) & ~MENDABLE)); /* delivered, and a dead letter */
	rows = rows | (insert[me].carried & EVENTS_IN(partition))
}

/* ClickHouse: each slot executes one insert at a time. */
active [INSERTS] proctype Server() {
	byte me = _pid - 2;
	byte k, live;
end:
	do
	:: atomic { insert[me].state == travelling ->
		if
		:: insert[me].carried & POISON -> endInsert(me, refused)
		:: insert[me].carried & sour -> endInsert(me, failed)
		:: else -> insert[me].state = running
		fi }
	:: atomic { insert[me].state == travelling && faults -> faults--; endInsert(me, failed) } /* the insert never arrives */
	:: atomic { insert[me].state == running && insert[me].placing == NOBODY && insert[me].todo ->
		k = (insert[me].todo & 1 -> 0 : 1);
		insert[me].todo = insert[me].todo & ~BIT(k);
		if
		:: known[k] & BIT(insert[me].token) /* ClickHouse knows the token, and drops the rows */
		:: !(known[k] & BIT(insert[me].token)) && !CLUSTER ->
			known[k] = known[k] | BIT(insert[me].token); insert[me].placing = k
		:: !(known[k] & BIT(insert[me].token)) && CLUSTER -> /* one commit in Keeper */
			known[k] = known[k] | BIT(insert[me].token); store(k)
		:: !(known[k] & BIT(insert[me].token)) && CLUSTER && faults && !(ghosts & EVENTS_IN(k)) -> /* Keeper fails during the commit */
			faults--;
			ghosts = ghosts | (insert[me].carried & EVENTS_IN(k)); ghost[k] = insert[me].token;
			endInsert(me, failed)
		fi;
		k = 0 }
	:: d_step { me == 0 && (ghosts & EVENTS_IN(0)) -> ghosts = ghosts & ~EVENTS_IN(0); ghost[0] = 0 } /* a replica removes rows that were not committed */
	:: d_step { me == 0 && (ghosts & EVENTS_IN(1)) -> ghosts = ghosts & ~EVENTS_IN(1); ghost[1] = 0 }
	:: d_step { insert[me].state == running && insert[me].placing != NOBODY ->
		store(insert[me].placing);
		insert[me].placing = NOBODY }
	:: atomic { insert[me].state == running && insert[me].placing == NOBODY && !insert[me].todo ->
		if
		:: endInsert(me, accepted)
		:: faults -> faults--; endInsert(me, failed) /* a view fails after the rows are stored */
		:: faults && (rows & insert[me].carried) -> faults--; endInsert(me, refused) /* a view refuses the rows after they are stored */
		fi }
	:: atomic { insert[me].state == running && (insert[me].placing != NOBODY || insert[me].todo) && faults ->
		faults--; endInsert(me, failed) } /* a disk fails, or the rest of the request is lost */
	od
}

/* An unverified batch waits until no insert of a lost history is in flight. */
#define CLAIMABLE(n) (batch[n].members && batch[n].holder == NOBODY && (!(batch[n].members & unverified) || !lost))

#define OURS (batch[b].members && batch[b].holder == me && batch[b].token == token)

/* idle ends the work of the worker, and releases its lease if it holds one. */
inline idle() {
	if
	:: OURS -> batch[b].holder = NOBODY
	:: else
	fi;
	b = 0; members = 0; token = 0; present = 0; covered = 0; sampled = 0; history = 0; cause = false; first = false; decided = false; hand[me] = 0; response[me] = none;
	tidy()
}

/* MAY_DIE is a point at which the worker may die. Another worker replaces it. */
#define MAY_DIE if :: true :: atomic { faults -> faults--; detach(me); idle() } -> goto ready fi

inline send() {
	k = 0;
	do
	:: k < INSERTS && insert[k].state != free -> k++
	:: else -> break
	od;
	assert(k < INSERTS);
	insert[k].state = travelling; insert[k].token = token; insert[k].carried = members;
	insert[k].todo = PARTITIONS_OF(members); insert[k].placing = NOBODY; insert[k].client = me;
	k = 0
}

/* sendSample inserts these events of the batch under the token of the batch. */
inline sendSample(events) {
	covered = EVENTS_BESIDE(events);
	sampled = events;
	present = members; members = events;
	send();
	members = present; present = 0
}

/* AWAIT_RESPONSE waits for the response, or gives up. */
#define AWAIT_RESPONSE if :: atomic { response[me] != none -> skip } :: atomic { response[me] == none && faults -> faults--; detach(me); response[me] = failed } fi

#ifdef MUTANT_CHECK_WITHOUT_WAITING
#define NONE_IN_FLIGHT true
#else
#define NONE_IN_FLIGHT (!RUNNING(token))
#endif

#ifdef MUTANT_LEASE_WITHOUT_THE_MARK
#define LAST_ATTEMPT true
#else
#define LAST_ATTEMPT (first == !batch[b].reattempted)
#endif

#ifdef MUTANT_LEASE_ACROSS_A_FAILOVER
#define SAME_HISTORY true
#else
#define SAME_HISTORY (history == failovers)
#endif

/* UNDECIDED rows come from a recent attempt on a cluster: Keeper decides whether they stay.
 * The rows of an old attempt are decided. */
#ifdef MUTANT_BELIEVE_A_REPLICA
#define UNDECIDED false
#define DECIDED true
#else
#define UNDECIDED (CLUSTER && present && !batch[b].forgotten)
#define DECIDED decided
#endif

active [WORKERS] proctype Worker() {
	byte me = _pid - 2 - INSERTS;
	byte k, b, members, token, present, covered, sampled, fresh, history, live;
	bool cause, first, decided;

ready:
end:
	do
	/* Cut: put the events without a batch into a new batch. A full batch takes some. */
	:: atomic { UNCUT && FREE_BATCH ->
		if
		:: members = UNCUT
		:: UNCUT == ALL -> members = 1
		fi;
#ifdef MUTANT_SEND_BEFORE_THE_CUT
		draw(); token = fresh; fresh = 0; hand[me] = BIT(token); send(); detach(me)
		};
		MAY_DIE;
		atomic {
		members = members & UNCUT;
		if
		:: members == 0 || (batch[0].members && batch[1].members) -> idle(); goto ready
		:: else
		fi;
#endif
		write(members, !(members & unverified));
#ifdef MUTANT_SEND_BEFORE_THE_CUT
		k = (batch[0].members == members -> 0 : 1); batch[k].token = token; k = 0; hand[me] = 0; token = 0;
#endif
		members = 0 }

	/* Claim: count the attempt and commit, */
	:: atomic {
		if
		:: CLAIMABLE(0) -> b = 0
		:: CLAIMABLE(1) -> b = 1
#if EVENTS == 3
		:: CLAIMABLE(2) -> b = 2
#endif
		fi;
		first = !batch[b].attempted;
#ifndef MUTANT_MARK_AFTER_THE_SEND
		batch[b].reattempted = batch[b].attempted; batch[b].attempted = true;
#endif
		members = batch[b].members; token = batch[b].token; hand[me] = BIT(token);
		history = failovers };
		MAY_DIE;
		/* then lock the batch, if no later attempt was counted. */
		atomic {
		if
		:: batch[b].members == members && batch[b].token == token && batch[b].holder == NOBODY &&
			LAST_ATTEMPT && SAME_HISTORY ->
			batch[b].holder = me; history = 0
		:: else -> idle(); goto ready
		fi };
		MAY_DIE;
		if
		:: first -> goto flush
		:: else -> goto resolve
		fi
	od;

flush:
	atomic { send() };
	MAY_DIE;
	AWAIT_RESPONSE;
#ifdef MUTANT_MARK_AFTER_THE_SEND
	MAY_DIE;
	atomic {
	if
	:: OURS -> batch[b].attempted = true
	:: else
	fi };
#endif
	MAY_DIE;
	if
	:: atomic { response[me] == accepted -> response[me] = none; goto settle }
	:: atomic { response[me] == failed ->
#ifdef MUTANT_CUT_ANEW
		if
		:: OURS -> erase(b)
		:: else
		fi;
#endif
		idle(); goto ready }
	:: atomic { response[me] == refused -> response[me] = none; cause = true;
#ifdef MUTANT_CONVICT_WITHOUT_CHECKING
		goto convict
#else
		goto resolve
#endif
	}
	fi;

resolve:
	atomic { /* a worker that has lost its lease notices it here */
	if
	:: OURS
	:: else -> idle(); goto ready
	fi };
	NONE_IN_FLIGHT;
	MAY_DIE;
	atomic {
	if
	:: OURS -> present = VISIBLE & members; decided = !(present & ghosts)
	:: else -> idle(); goto ready
	fi };
	MAY_DIE;
	if
	:: UNDECIDED && !cause -> goto reinsert /* let Keeper decide which rows stay */
	:: atomic { UNDECIDED && cause -> idle(); goto ready } /* the next attempt lets Keeper decide */
	:: atomic { present && !UNDECIDED && !DECIDED -> idle(); goto ready } /* wait until the replica keeps or removes the rows */
	:: present == members && DECIDED -> goto settle
	:: present != members && present && DECIDED -> goto shrink
	:: !present && cause -> goto convict
	:: !present && !cause -> goto reinsert
#if SUSPECT
	:: !present && !cause && !SINGLE(members) -> goto sample
	:: !present && !cause && (members & SOUR) && SINGLE(members) -> goto deadLetter
#endif
	fi;

reinsert: /* the same rows under the same token */
#ifdef MUTANT_NEW_TOKEN_ON_RESEND
	atomic {
	if
	:: OURS -> draw(); token = fresh; fresh = 0; batch[b].token = token; hand[me] = BIT(token); tidy()
	:: else -> idle(); goto ready
	fi };
#endif
	atomic { send() };
	MAY_DIE;
	AWAIT_RESPONSE;
	MAY_DIE;
	if
	:: atomic { response[me] == accepted -> response[me] = none }
	:: atomic { response[me] == failed -> idle(); goto ready }
	:: atomic { response[me] == refused -> response[me] = none; cause = true; goto resolve }
	fi;
#ifdef MUTANT_SETTLE_A_RESEND
	goto settle;
#endif
	atomic {
	if
	:: OURS
	:: else -> idle(); goto ready
	fi };
	NONE_IN_FLIGHT;
	MAY_DIE;
	atomic {
	if
	:: OURS -> present = VISIBLE & members
	:: else -> idle(); goto ready
	fi };
	MAY_DIE;
	if
	:: present == members -> goto settle
	:: present != members && present -> goto shrink
	:: !present -> skip
	fi;
	atomic { /* renew the token: ClickHouse knows it, and the rows are absent */
	if
	:: OURS -> draw(); batch[b].token = fresh; fresh = 0; batch[b].attempted = false; batch[b].reattempted = false; batch[b].forgotten = false; batch[b].holder = NOBODY
	:: else
	fi;
	idle() };
	goto ready;

settle:
	atomic {
	if
	:: OURS ->
		assert((rows & members) == members); /* lost */
		waiting = waiting & ~members;
		erase(b)
	:: else
	fi;
	idle() };
	goto ready;

shrink: /* settle the events that are present; the others keep the batch and its token */
	atomic {
	if
	:: OURS ->
		waiting = waiting & ~present;
		batch[b].members = members & ~present;
		batch[b].holder = NOBODY
#ifdef MUTANT_NEW_TOKEN_FOR_THE_REST
		; draw(); batch[b].token = fresh; fresh = 0; batch[b].attempted = false; batch[b].reattempted = false
#endif
	:: else
	fi;
	idle() };
	goto ready;

sample: /* insert some events of the batch under its token, so that the rest may leave the token */
#ifdef MUTANT_SPLIT_BEFORE_THE_SAMPLE
	atomic {
	if
	:: OURS ->
		k = (members & 1 -> 1 : 2);
		present = members & ~k;
		batch[b].members = k; batch[b].holder = NOBODY;
		write(present, true)
	:: else
	fi;
	idle() };
	goto ready;
#endif
#ifndef MUTANT_SAMPLE_A_RECENT_BATCH
	atomic { /* on a cluster, only an old batch is sampled: after the sample, no insert under the token lets Keeper decide */
	if
	:: OURS && CLUSTER -> batch[b].forgotten = true
	:: OURS && !CLUSTER
	:: else -> idle(); goto ready
	fi };
#endif
	atomic {
	if
	:: (members & 1) -> sendSample(1)
	:: (members & 2) -> sendSample(2)
#if EVENTS == 3
	:: (members & 4) -> sendSample(4)
	:: (members == 7) -> sendSample(5)
	:: (members == 7) -> sendSample(6)
#endif
	fi };
	MAY_DIE;
	AWAIT_RESPONSE;
	MAY_DIE;
	atomic {
#ifndef MUTANT_COVER_WITHOUT_AN_ACKNOWLEDGEMENT
	if
	:: response[me] != accepted -> covered = 0; sampled = 0
	:: else
	fi;
#endif
	response[me] = none;
	if
	:: OURS
	:: else -> idle(); goto ready
	fi };
#ifndef MUTANT_COVER_WITHOUT_WAITING
	NONE_IN_FLIGHT;
#endif
	MAY_DIE;
	atomic {
	if
#ifndef MUTANT_BELIEVE_A_REPLICA_AFTER_A_SAMPLE
	:: OURS && CLUSTER && (VISIBLE & members & ~sampled) -> idle(); goto ready /* rows of an earlier insert, or of a sample that failed */
	:: OURS && !(CLUSTER && (VISIBLE & members & ~sampled)) -> present = VISIBLE & members; covered = covered | EVENTS_BESIDE(present)
#else
	:: OURS -> present = VISIBLE & members; covered = covered | EVENTS_BESIDE(present)
#endif
	:: else -> idle(); goto ready
	fi };
	MAY_DIE;
	if
	:: present == members -> goto settle
	:: !covered -> atomic { idle() }; goto ready
	:: covered && present != members -> skip
	fi;
	atomic {
	if
	:: OURS ->
		waiting = waiting & ~present;
		members = members & ~present;
#ifdef MUTANT_SPLIT_ANOTHER_PARTITION
		present = members;
#else
		/* ClickHouse remembers the token in the partitions of the events that are
		   present, and in those of a sample that it has acknowledged. No insert of the
		   batch can store a row there any more. */
		present = members & covered;
#endif
		members = members & ~present;
		if
		:: members -> batch[b].members = members; batch[b].holder = NOBODY
		:: else -> erase(b)
		fi;
		if
		:: present -> write(present, true)
		:: present && !SINGLE(present) ->
			covered = present & -present;
			present = present & ~covered;
			write(covered, true);
			write(present, true)
		:: else
		fi
	:: else
	fi;
	idle() };
	goto ready;

#if SUSPECT
deadLetter: /* a single event that fails although others arrive becomes a dead letter, which keeps the token */
	atomic {
	if
	:: OURS ->
		assert(!(rows & members & ~MENDABLE)); /* delivered, and a dead letter */
		dead = dead | members;
		if
		:: members & MENDABLE & 1 -> kept[0] = token
		:: members & MENDABLE & 2 -> kept[1] = token
#if EVENTS == 3
		:: members & MENDABLE & 4 -> kept[2] = token
#endif
		:: else
		fi;
		waiting = waiting & ~members;
		erase(b)
	:: else
	fi;
	idle() };
	goto ready;
#endif

convict: /* ClickHouse names the data of the batch as the cause */
	if
	:: !SINGLE(members) -> goto sample
	:: else
	fi;
	atomic {
	if
	:: OURS ->
		assert(!(rows & members)); /* delivered, and a dead letter */
		dead = dead | members;
		waiting = waiting & ~members;
		erase(b)
	:: else
	fi;
	idle() };
	goto ready
}

#if OPERATOR
/* requeue returns a dead letter into the outbox, as a batch under its token. */
inline requeue(e) {
	dead = dead & ~BIT(e); waiting = waiting | BIT(e); requeued = requeued | BIT(e);
#ifdef MUTANT_REQUEUE_UNDER_A_NEW_TOKEN
	write(BIT(e), false);
#else
	k = FREE_PLACE;
	assert(batch[k].members == 0);
	batch[k].members = BIT(e); batch[k].token = kept[e]; batch[k].holder = NOBODY;
#ifndef MUTANT_REQUEUE_AS_A_FIRST_ATTEMPT
	/* A worker of the former batch cannot lock this batch. */
	batch[k].attempted = true; batch[k].reattempted = true;
#endif
	k = 0;
#endif
	kept[e] = 0
}

/* An operator mends the cause of SOUR at any time, and requeues each dead letter once. */
active proctype Operator() {
	byte k, fresh, live;
end:
	do
	:: d_step { sour -> sour = 0 }
	:: atomic { (dead & MENDABLE & ~requeued & 1) -> requeue(0) }
	:: atomic { (dead & MENDABLE & ~requeued & 2) -> requeue(1) }
#if EVENTS == 3
	:: atomic { (dead & MENDABLE & ~requeued & 4) -> requeue(2) }
#endif
	od
}
#endif

/* When no step is possible, every event has arrived or is a dead letter. */
active proctype Verdict() {
	timeout ->
	assert(!uncommitted && !waiting && !IN_BATCHES);
	assert((rows & ~MENDABLE) == (ALL & ~dead & ~MENDABLE));
	assert((rows | dead) == ALL);
	assert(!(dead & ~(POISON | SOUR)))
}
