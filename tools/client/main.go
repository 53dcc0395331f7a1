// Command client calls the API at a URL with the client that oapi-codegen
// generates from the OpenAPI document. The suite in test/httpapi generates that
// client in a copy of this directory, and runs this command.
package main

import (
	"context"
	"fmt"
	"log"
	"os"

	"github.com/diehard-outbox/diehard/tools/client/diehard"
)

//go:generate sh -c "mkdir -p diehard && go tool oapi-codegen -generate types,client -package diehard -o diehard/client.go \"$OPENAPI\""

func main() {
	log.SetFlags(0)
	if err := run(context.Background(), os.Args[1]); err != nil {
		log.Fatal(err)
	}
}

// run creates a user and publishes events. It expects responses of the types in the
// document.
func run(ctx context.Context, url string) error {
	client, err := diehard.NewClientWithResponses(url)
	if err != nil {
		return err
	}
	first, key := "Ada", "8e03978e-40d5-43dd-bc93-6894a57f9324"
	newUser := diehard.NewUser{Email: "ada@example.com", FirstName: &first}
	created, err := client.CreateUserWithResponse(ctx, &diehard.CreateUserParams{IdempotencyKey: &key}, newUser)
	if err != nil {
		return err
	}
	if created.JSON201 == nil {
		return fmt.Errorf("create: %s %s", created.Status(), created.Body)
	}
	taken, err := client.CreateUserWithResponse(ctx, nil, newUser)
	if err != nil {
		return err
	}
	if taken.ApplicationproblemJSON409 == nil || taken.ApplicationproblemJSON409.Title != "E-mail address taken" {
		return fmt.Errorf("create again: %s %s", taken.Status(), taken.Body)
	}
	found, err := client.GetUserWithResponse(ctx, created.JSON201.Id, nil)
	if err != nil {
		return err
	}
	if found.JSON200 == nil || *found.JSON200 != *created.JSON201 {
		return fmt.Errorf("get: %s %s", found.Status(), found.Body)
	}
	limit := 1
	page, err := client.ListUsersWithResponse(ctx, &diehard.ListUsersParams{Limit: &limit})
	if err != nil {
		return err
	}
	if page.JSON200 == nil || len(page.JSON200.Data) != 1 || page.JSON200.NextCursor != nil {
		return fmt.Errorf("list: %s %s", page.Status(), page.Body)
	}
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
	fmt.Println(created.JSON201.Id)
	return nil
}
