// Command client calls the API at a URL with the client that oapi-codegen
// generates from the OpenAPI document. The suite in test/httpapi generates that
// client in a copy of this directory, and runs this command:
//
//	client URL KEY READER
//
// KEY is an API key with all rights. READER is an API key with the scope users.read only.
package main

import (
	"context"
	"fmt"
	"log"
	"net/http"
	"os"

	"github.com/diehard-outbox/diehard/tools/client/diehard"
)

//go:generate sh -c "mkdir -p diehard && go tool oapi-codegen -generate types,client -package diehard -o diehard/client.go \"$OPENAPI\""

func main() {
	log.SetFlags(0)
	if len(os.Args) != 4 {
		log.Fatal("usage: client URL KEY READER")
	}
	if err := run(context.Background(), os.Args[1], os.Args[2], os.Args[3]); err != nil {
		log.Fatal(err)
	}
}

// run creates, changes and deletes users, and publishes events. It expects responses of the
// types in the document. It prints the id of the first user.
func run(ctx context.Context, url, key, reader string) error {
	client, err := connect(url, key)
	if err != nil {
		return err
	}
	limited, err := connect(url, reader)
	if err != nil {
		return err
	}
	user, err := create(ctx, client)
	if err != nil {
		return err
	}
	if err := read(ctx, limited, *user); err != nil {
		return err
	}
	if err := change(ctx, client, *user); err != nil {
		return err
	}
	if err := refuse(ctx, limited, *user); err != nil {
		return err
	}
	if err := remove(ctx, client, *user); err != nil {
		return err
	}
	if err := changeMany(ctx, client); err != nil {
		return err
	}
	if err := publish(ctx, client); err != nil {
		return err
	}
	fmt.Println(user.Id)
	return nil
}

// connect returns a client that sends the API key with each request.
func connect(url, key string) (*diehard.ClientWithResponses, error) {
	return diehard.NewClientWithResponses(url, diehard.WithRequestEditorFn(func(_ context.Context, r *http.Request) error {
		r.Header.Set("Authorization", "Bearer "+key)
		return nil
	}))
}

// create creates a user with an idempotency key, and expects a conflict without the key.
func create(ctx context.Context, client *diehard.ClientWithResponses) (*diehard.User, error) {
	newUser := diehard.NewUser{Email: "ada@example.com", FirstName: new("Ada")}
	params := &diehard.CreateUserParams{IdempotencyKey: new("8e03978e-40d5-43dd-bc93-6894a57f9324")}
	created, err := client.CreateUserWithResponse(ctx, params, newUser)
	if err != nil {
		return nil, err
	}
	if created.JSON201 == nil || created.HTTPResponse.Header.Get("ETag") == "" {
		return nil, fmt.Errorf("create: %s %s", created.Status(), created.Body)
	}
	taken, err := client.CreateUserWithResponse(ctx, nil, newUser)
	if err != nil {
		return nil, err
	}
	if taken.ApplicationproblemJSON409 == nil || taken.ApplicationproblemJSON409.Title != "E-mail address taken" {
		return nil, fmt.Errorf("create again: %s %s", taken.Status(), taken.Body)
	}
	return created.JSON201, nil
}

// read expects to find the user by its id, and on the only page of the list.
func read(ctx context.Context, client *diehard.ClientWithResponses, user diehard.User) error {
	found, err := client.GetUserWithResponse(ctx, user.Id, nil)
	if err != nil {
		return err
	}
	if found.JSON200 == nil || *found.JSON200 != user {
		return fmt.Errorf("get: %s %s", found.Status(), found.Body)
	}
	page, err := client.ListUsersWithResponse(ctx, &diehard.ListUsersParams{Limit: new(1)})
	if err != nil {
		return err
	}
	if page.JSON200 == nil || len(page.JSON200.Data) != 1 || page.JSON200.NextCursor != nil {
		return fmt.Errorf("list: %s %s", page.Status(), page.Body)
	}
	return nil
}

// change changes the version of the user that it has read. It expects that the same
// version cannot be changed again.
func change(ctx context.Context, client *diehard.ClientWithResponses, user diehard.User) error {
	found, err := client.GetUserWithResponse(ctx, user.Id, nil)
	if err != nil {
		return err
	}
	version := found.HTTPResponse.Header.Get("ETag")
	params := &diehard.UpdateUserParams{IfMatch: &version, IdempotencyKey: new("2c1a7f0e-7a4c-4b0e-9d5e-0a7c3b1f6d21")}
	patch := diehard.UserChange{LastName: new("Lovelace")}
	changed, err := client.UpdateUserWithApplicationMergePatchPlusJSONBodyWithResponse(ctx, user.Id, params, patch)
	if err != nil {
		return err
	}
	if changed.JSON200 == nil || changed.JSON200.LastName != "Lovelace" || changed.JSON200.FirstName != "Ada" ||
		changed.HTTPResponse.Header.Get("ETag") == version {
		return fmt.Errorf("change: %s %s", changed.Status(), changed.Body)
	}
	late, err := client.UpdateUserWithResponse(ctx, user.Id, &diehard.UpdateUserParams{IfMatch: &version}, diehard.UserChange{LastName: new("King")})
	if err != nil {
		return err
	}
	if late.ApplicationproblemJSON412 == nil {
		return fmt.Errorf("change an old version: %s %s", late.Status(), late.Body)
	}
	return nil
}

// refuse expects that the client cannot delete the user, because its key has another scope.
func refuse(ctx context.Context, client *diehard.ClientWithResponses, user diehard.User) error {
	refused, err := client.DeleteUserWithResponse(ctx, user.Id, nil)
	if err != nil {
		return err
	}
	if refused.ApplicationproblemJSON403 == nil || refused.ApplicationproblemJSON403.Title != "Insufficient scope" {
		return fmt.Errorf("delete without the scope: %s %s", refused.Status(), refused.Body)
	}
	return nil
}

// remove deletes the user, and expects the same response to a second deletion.
func remove(ctx context.Context, client *diehard.ClientWithResponses, user diehard.User) error {
	for range 2 {
		deleted, err := client.DeleteUserWithResponse(ctx, user.Id, nil)
		if err != nil {
			return err
		}
		if deleted.StatusCode() != http.StatusNoContent {
			return fmt.Errorf("delete: %s %s", deleted.Status(), deleted.Body)
		}
	}
	gone, err := client.GetUserWithResponse(ctx, user.Id, nil)
	if err != nil {
		return err
	}
	if gone.ApplicationproblemJSON404 == nil {
		return fmt.Errorf("get a deleted user: %s %s", gone.Status(), gone.Body)
	}
	return nil
}

// changeMany creates, changes and deletes users in batches.
func changeMany(ctx context.Context, client *diehard.ClientWithResponses) error {
	created, err := client.CreateUsersWithResponse(ctx, nil, diehard.NewUsers{Data: []diehard.NewUser{
		{Email: "grace@example.com"}, {Email: "edsger@example.com"},
	}})
	if err != nil {
		return err
	}
	if created.JSON200 == nil || created.JSON200.Data[0].User == nil || created.JSON200.Data[1].User == nil {
		return fmt.Errorf("create many: %s %s", created.Status(), created.Body)
	}
	first, second := created.JSON200.Data[0].User.Id, created.JSON200.Data[1].User.Id
	changed, err := client.UpdateUsersWithResponse(ctx, nil, diehard.UserChanges{Data: []diehard.IdentifiedUserChange{
		{Id: first, FirstName: new("Grace")}, {Id: first, Email: new("edsger@example.com")},
	}})
	if err != nil {
		return err
	}
	if changed.JSON200 == nil || changed.JSON200.Data[0].User == nil || changed.JSON200.Data[1].Problem == nil {
		return fmt.Errorf("change many: %s %s", changed.Status(), changed.Body)
	}
	deleted, err := client.DeleteUsersWithResponse(ctx, &diehard.DeleteUsersParams{Atomic: new(true)}, diehard.UserDeletions{
		Data: []diehard.UserDeletion{{Id: first}, {Id: second}},
	})
	if err != nil {
		return err
	}
	if deleted.JSON200 == nil || len(deleted.JSON200.Data) != 2 || deleted.JSON200.Data[0].Status != http.StatusNoContent {
		return fmt.Errorf("delete many: %s %s", deleted.Status(), deleted.Body)
	}
	return nil
}

// publish publishes a valid and an invalid event.
func publish(ctx context.Context, client *diehard.ClientWithResponses) error {
	events, err := client.PublishEventsWithResponse(ctx, nil, diehard.NewEvents{Data: []diehard.NewEvent{
		{EventType: "order_placed", EventContext: map[string]any{"order_id": "A-1001"}},
		{EventType: "Order placed"},
	}})
	if err != nil {
		return err
	}
	if events.JSON200 == nil || events.JSON200.Data[0].EventId == nil || events.JSON200.Data[1].Problem == nil {
		return fmt.Errorf("publish: %s %s", events.Status(), events.Body)
	}
	return nil
}
