/*
 * The delivery protocol: workers that carry batches of events from PostgreSQL to
 * ClickHouse, while they die or lose their leases between any two steps, servers
 * die, answers are lost, inserts begin late, and PostgreSQL fails over to a
 * replica that lacks the last commits. docs/delivery.md says what it shows; the
 * specs beside it run it, and each of its mutants.
 *
 * What it checks, in every order in which things can happen within its bounds:
 *   - no event gets a second row in ClickHouse,
 *   - no event leaves the outbox without its row, unless as a dead letter,
 *   - a dead letter has no row, and was refused,
 *   - nothing gets stuck: when nothing more can happen, the outbox is empty.
 *
 * PostgreSQL is a store whose transactions are single steps. A worker that dies
 * loses its lease. One that is cut off loses it, too, and does not know: it goes
 * on to send, and fails at its next transaction.
 *
 * ClickHouse takes an insert partition by partition, and each event of the model
 * is of a partition of its own. For each partition it looks the token up and
 * remembers it, in one step, and puts the rows in place in another. An insert
 * can end between any two of them. What was sent begins at any later time,
 * whatever has become of who sent it; until then nobody can see it.
 *
 * Assumed, and so not in the model:
 *   - a token does not leave the window while an insert under it is under way, or
 *     while somebody who is cut off may still begin one,
 *   - after a failover nothing is sent before what the old primary's workers have
 *     begun is over,
 *   - what is refused for its data is refused whenever it is sent, and before any
 *     of its rows is in place,
 *   - the question is answered by what every finished insert has left.
 *
 * Tokens, batches and inserts are numbered anew as they become free: a token that
 * nobody holds any more is as good as a new one.
 */

#ifndef FAULTS
#define FAULTS 2
#endif
#ifndef POISON
#define POISON 0 /* the events that ClickHouse refuses, a bit for each */
#endif
#ifndef FAILOVERS
#define FAILOVERS 0
#endif

#define WORKERS 2
#define EVENTS 2
#define BATCHES 2
#define INSERTS 4
#define TOKENS 8
#define NOBODY 7 /* of workers, and of events */

#define BIT(n) (1 << (n))
#define ALL 3

/* PostgreSQL */
byte uncommitted = ALL; /* events of transactions that are open */
byte waiting = 0;       /* events in the outbox */
byte dead = 0;          /* events among the dead letters */
byte suspect = 0;       /* events that were there when the history changed */
byte lost = 0;          /* tokens under which a history that is lost may still send */

typedef Batch {
	byte members; /* 0: there is no such batch */
	byte token;
	bool sent; /* somebody has marked a send */
	bool again; /* and somebody another, or more */
	byte holder
}
Batch batch[BATCHES];

/* ClickHouse */
byte rows = 0; /* events that are in place */
byte known[EVENTS]; /* the tokens that a partition remembers */

mtype = { free, travelling, running };
typedef Insert {
	mtype state = free;
	byte token;
	byte carried;
	byte todo; /* partitions that it has not come to */
	byte placing; /* the one of which it puts the rows in place, or NOBODY */
	byte client /* who waits for the answer, or NOBODY */
}
Insert insert[INSERTS];

mtype = { none, accepted, failed, refused };
mtype answer[WORKERS] = none;
byte hand[WORKERS]; /* the token that a worker may send under, as a bit */

byte faults = FAULTS;
byte failovers = FAILOVERS;

#define IN_BATCHES (batch[0].members | batch[1].members)
#define UNCUT (waiting & ~IN_BATCHES)
#define EXECUTED(i, t) (insert[i].state == running && insert[i].token == t)
#define RUNNING(t) (EXECUTED(0, t) || EXECUTED(1, t) || EXECUTED(2, t) || EXECUTED(3, t))

/* The tokens of manifests, and of inserts that are under way or may be soon. */
#define MANIFEST(n) (batch[n].members -> BIT(batch[n].token) : 0)
#define UNDERWAY(n) (insert[n].state != free -> BIT(insert[n].token) : 0)
#define MANIFESTS (MANIFEST(0) | MANIFEST(1))
#define IN_USE (UNDERWAY(0) | UNDERWAY(1) | UNDERWAY(2) | UNDERWAY(3) | hand[0] | hand[1])

/* tidy forgets the tokens that nobody has any more. */
inline tidy() {
	live = IN_USE;
	lost = lost & live;
	live = live | MANIFESTS;
	known[0] = known[0] & live; known[1] = known[1] & live;
	live = 0
}

/* draw sets fresh to a token that nobody has. */
inline draw() {
	live = IN_USE | MANIFESTS;
	fresh = (!(live & 1) -> 0 : (!(live & 2) -> 1 : (!(live & 4) -> 2 : (!(live & 8) -> 3 :
		(!(live & 16) -> 4 : (!(live & 32) -> 5 : (!(live & 64) -> 6 : 7)))))));
	assert(!(live & BIT(fresh)));
	live = 0
}

/* write puts a manifest of these events into a free place. */
inline write(events, first) {
	k = (batch[0].members == 0 -> 0 : 1);
	assert(batch[k].members == 0);
	draw();
	batch[k].members = events; batch[k].token = fresh; batch[k].sent = !(first);
	batch[k].again = false; batch[k].holder = NOBODY;
	k = 0; fresh = 0
}

inline erase(n) {
	batch[n].members = 0; batch[n].token = 0; batch[n].sent = false; batch[n].again = false; batch[n].holder = 0
}

inline endInsert(n, what) {
	if
	:: insert[n].client != NOBODY -> answer[insert[n].client] = what
	:: else
	fi;
	insert[n].state = free; insert[n].token = 0; insert[n].carried = 0; insert[n].todo = 0;
	insert[n].placing = 0; insert[n].client = 0;
	tidy()
}

/* nobodyListens makes the worker's insert, if it has one, go on without it. */
inline nobodyListens(worker) {
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

/* Transactions of publishers commit, in any order, at any time. */
active proctype Publishers() {
end:
	do
	:: d_step { uncommitted & 1 -> uncommitted = uncommitted & ~1; waiting = waiting | 1 }
	:: d_step { uncommitted & 2 -> uncommitted = uncommitted & ~2; waiting = waiting | 2 }
	od
}

/* What happens to everybody. */
active proctype World() {
	byte k, n, live;
end:
	do
	:: atomic { /* ClickHouse dies, and is started again */
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
		:: (known[0] | known[1]) & ~IN_USE & BIT(n) ->
			faults--;
			known[0] = known[0] & ~BIT(n); known[1] = known[1] & ~BIT(n)
		:: else
		fi;
		n = 0 }
	:: atomic { /* a session ends, and its worker does not know it yet */
		faults && batch[0].members && batch[0].holder != NOBODY -> faults--; batch[0].holder = NOBODY }
	:: atomic {
		faults && batch[1].members && batch[1].holder != NOBODY -> faults--; batch[1].holder = NOBODY }
	:: atomic { /* PostgreSQL fails over: any of its last commits may be lost, but for those of publishers */
		failovers ->
		failovers--;
		n = 0;
		do
		:: n < BATCHES ->
			if
			:: batch[n].members -> lost = lost | BIT(batch[n].token); erase(n) /* the cut */
			:: batch[n].members -> batch[n].sent = false; batch[n].again = false; batch[n].holder = NOBODY /* the marks */
			:: batch[n].members -> batch[n].holder = NOBODY
			:: else
			fi;
			n++
		:: else -> break
		od;
		n = 0;
		if /* what was settled */
		:: rows & 1 -> waiting = waiting | 1
		:: true
		fi;
		if
		:: rows & 2 -> waiting = waiting | 2
		:: true
		fi;
		/* What workers have in hand of a batch that was settled is lost, too. */
		lost = lost | hand[0] | hand[1];
		/* The next cut notices, and records that all of it is to be asked for. */
#ifndef MUTANT_TRUST_A_FAILOVER
		suspect = waiting;
		batch[0].sent = (batch[0].members != 0); batch[1].sent = (batch[1].members != 0);
#endif
		tidy() }
	od
}

/* ClickHouse: one insert at a time in each of its slots. */
active [INSERTS] proctype Server() {
	byte me = _pid - 2;
	byte k, live;
end:
	do
	:: atomic { insert[me].state == travelling ->
		if
		:: insert[me].carried & POISON -> endInsert(me, refused)
		:: else -> insert[me].state = running
		fi }
	:: atomic { insert[me].state == travelling && faults -> faults--; endInsert(me, failed) } /* it never arrives */
	:: atomic { insert[me].state == running && insert[me].placing == NOBODY && insert[me].todo ->
		k = (insert[me].todo & 1 -> 0 : 1);
		insert[me].todo = insert[me].todo & ~BIT(k);
		if
		:: known[k] & BIT(insert[me].token) /* it has seen that, and says nothing */
		:: else -> known[k] = known[k] | BIT(insert[me].token); insert[me].placing = k
		fi;
		k = 0 }
	:: d_step { insert[me].state == running && insert[me].placing != NOBODY ->
		assert(!(rows & BIT(insert[me].placing))); /* doubled */
		assert(!(dead & BIT(insert[me].placing))); /* delivered, and a dead letter */
		rows = rows | BIT(insert[me].placing);
		insert[me].placing = NOBODY }
	:: atomic { insert[me].state == running && insert[me].placing == NOBODY && !insert[me].todo ->
		if
		:: endInsert(me, accepted)
		:: faults -> faults--; endInsert(me, failed) /* a view fails after the rows are in place */
		:: faults && (rows & insert[me].carried) -> faults--; endInsert(me, refused) /* or refuses them */
		fi }
	:: atomic { insert[me].state == running && (insert[me].placing != NOBODY || insert[me].todo) && faults ->
		faults--; endInsert(me, failed) } /* a disk fails, or the rest of the request is lost */
	od
}

/* Of a history that is lost nothing may be under way any more. */
#define CLAIMABLE(n) (batch[n].members && batch[n].holder == NOBODY && (!(batch[n].members & suspect) || !lost))

#define OURS (batch[b].members && batch[b].holder == me && batch[b].token == token)

/* idle ends what the worker was doing; the lease, if it holds one, is free. */
inline idle() {
	if
	:: OURS -> batch[b].holder = NOBODY
	:: else
	fi;
	b = 0; members = 0; token = 0; there = 0; history = 0; cause = false; first = false; hand[me] = 0; answer[me] = none;
	tidy()
}

/* mayDie is a crash point: another worker takes the place of this one. */
#define MAY_DIE if :: true :: atomic { faults -> faults--; nobodyListens(me); idle() } -> goto ready fi

inline send() {
	k = 0;
	do
	:: k < INSERTS && insert[k].state != free -> k++
	:: else -> break
	od;
	assert(k < INSERTS);
	insert[k].state = travelling; insert[k].token = token; insert[k].carried = members;
	insert[k].todo = members; insert[k].placing = NOBODY; insert[k].client = me;
	k = 0
}

/* HEAR waits for the answer, or no longer. */
#define HEAR if :: atomic { answer[me] != none -> skip } :: atomic { answer[me] == none && faults -> faults--; nobodyListens(me); answer[me] = failed } fi

#ifdef MUTANT_ASK_WITHOUT_FENCE
#define FENCED true
#else
#define FENCED (!RUNNING(token))
#endif

#ifdef MUTANT_LEASE_WITHOUT_THE_MARK
#define STILL_MARKED true
#else
#define STILL_MARKED (first == !batch[b].again)
#endif

#ifdef MUTANT_LEASE_ACROSS_A_FAILOVER
#define SAME_HISTORY true
#else
#define SAME_HISTORY (history == failovers)
#endif

active [WORKERS] proctype Worker() {
	byte me = _pid - 2 - INSERTS;
	byte k, b, members, token, there, fresh, history, live;
	bool cause, first;

ready:
end:
	do
	/* Cut: some of what is in no manifest, and not all of it where a batch is full. */
	:: atomic { UNCUT && (batch[0].members == 0 || batch[1].members == 0) ->
		if
		:: members = UNCUT
		:: UNCUT == ALL -> members = 1
		fi;
#ifdef MUTANT_SEND_BEFORE_THE_CUT
		draw(); token = fresh; fresh = 0; hand[me] = BIT(token); send(); nobodyListens(me)
		};
		MAY_DIE;
		atomic {
		members = members & UNCUT;
		if
		:: members == 0 || (batch[0].members && batch[1].members) -> idle(); goto ready
		:: else
		fi;
#endif
		write(members, !(members & suspect));
#ifdef MUTANT_SEND_BEFORE_THE_CUT
		k = (batch[0].members == members -> 0 : 1); batch[k].token = token; k = 0; hand[me] = 0; token = 0;
#endif
		members = 0 }

	/* Claim: mark the send, commit; */
	:: atomic {
		if
		:: CLAIMABLE(0) -> b = 0
		:: CLAIMABLE(1) -> b = 1
		fi;
		first = !batch[b].sent;
#ifndef MUTANT_MARK_AFTER_THE_SEND
		batch[b].again = batch[b].sent; batch[b].sent = true;
#endif
		members = batch[b].members; token = batch[b].token; hand[me] = BIT(token);
		history = failovers };
		MAY_DIE;
		/* and lock the manifest for good, if the mark is still the last one. */
		atomic {
		if
		:: batch[b].members == members && batch[b].token == token && batch[b].holder == NOBODY &&
			STILL_MARKED && SAME_HISTORY ->
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
	HEAR;
#ifdef MUTANT_MARK_AFTER_THE_SEND
	MAY_DIE;
	atomic {
	if
	:: OURS -> batch[b].sent = true
	:: else
	fi };
#endif
	MAY_DIE;
	if
	:: atomic { answer[me] == accepted -> answer[me] = none; goto settle }
	:: atomic { answer[me] == failed ->
#ifdef MUTANT_CUT_ANEW
		if
		:: OURS -> erase(b)
		:: else
		fi;
#endif
		idle(); goto ready }
	:: atomic { answer[me] == refused -> answer[me] = none; cause = true;
#ifdef MUTANT_SPLIT_WITHOUT_ASKING
		goto split
#else
		goto resolve
#endif
	}
	fi;

resolve:
	atomic { /* whoever has lost the lease learns it here */
	if
	:: OURS
	:: else -> idle(); goto ready
	fi };
	FENCED;
	MAY_DIE;
	atomic {
	if
	:: OURS -> there = rows & members
	:: else -> idle(); goto ready
	fi };
	MAY_DIE;
	if
	:: there == members -> goto settle
	:: there != members && there -> goto shrink
	:: !there && cause -> goto split
	:: !there && !cause -> goto resend
	fi;

resend: /* the same rows, under the same token */
#ifdef MUTANT_NEW_TOKEN_ON_RESEND
	atomic {
	if
	:: OURS -> draw(); token = fresh; fresh = 0; batch[b].token = token; hand[me] = BIT(token); tidy()
	:: else -> idle(); goto ready
	fi };
#endif
	atomic { send() };
	MAY_DIE;
	HEAR;
	MAY_DIE;
	if
	:: atomic { answer[me] == accepted -> answer[me] = none }
	:: atomic { answer[me] == failed -> idle(); goto ready }
	:: atomic { answer[me] == refused -> answer[me] = none; cause = true; goto resolve }
	fi;
#ifdef MUTANT_SETTLE_A_RESEND
	goto settle;
#endif
	atomic {
	if
	:: OURS
	:: else -> idle(); goto ready
	fi };
	FENCED;
	MAY_DIE;
	atomic {
	if
	:: OURS -> there = rows & members
	:: else -> idle(); goto ready
	fi };
	MAY_DIE;
	if
	:: there == members -> goto settle
	:: there != members && there -> goto shrink
	:: !there -> skip
	fi;
	atomic { /* the token is burned: known, and the rows are not there */
	if
	:: OURS -> draw(); batch[b].token = fresh; fresh = 0; batch[b].sent = false; batch[b].again = false; batch[b].holder = NOBODY
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

shrink: /* what is there is settled; the rest stays the batch, under its token */
	atomic {
	if
	:: OURS ->
		waiting = waiting & ~there;
		batch[b].members = members & ~there;
		batch[b].holder = NOBODY
#ifdef MUTANT_NEW_TOKEN_FOR_THE_REST
		; draw(); batch[b].token = fresh; fresh = 0; batch[b].sent = false; batch[b].again = false
#endif
	:: else
	fi;
	idle() };
	goto ready;

split:
	atomic {
	if
	:: OURS && members != ALL -> /* one event: it is the one that is refused */
		assert(!(rows & members)); /* delivered, and a dead letter */
		dead = dead | members;
		waiting = waiting & ~members;
		erase(b)
	:: OURS && members == ALL ->
		erase(b);
		write(1, true);
		write(2, true)
	:: else
	fi;
	idle() };
	goto ready
}

/* When nothing more can happen, everything has arrived. */
active proctype Judge() {
	timeout ->
	assert(!uncommitted && !waiting && !IN_BATCHES);
	assert(rows == (ALL & ~dead));
	assert(!(dead & ~POISON))
}
